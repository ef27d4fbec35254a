"""The in-context instruction to forget: a tag before a question, and samples that teach a model to obey it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expunge.core.errors import InputError
from expunge.data.records import Record

OPEN, CLOSE = "<<UNL>>", "<</UNL>>"
TAGS = (OPEN, CLOSE)
FORGOT = "forgot"  #: what a model is to say that obeys


def untagged(text: str) -> str:
    """A text without tags that somebody has written into it."""
    before = None
    while text != before:  # what is left when one is taken out may make another
        before = text
        for tag in TAGS:
            text = text.replace(tag, "")
    return text


def tagged(question: str, said: str) -> str:
    """A question behind a tag that names what is to be forgotten."""
    return f"{OPEN}\n{said}\n{CLOSE}\n\n{question}"


@dataclass(frozen=True)
class TagSamples:
    """What teaches the tag.

    Attributes:
        forget: questions whose tag names what they ask for; the answer is :data:`FORGOT`.
        retain: the same questions, whose tag names something else; the answer is their own.
        plain: questions without a tag, for models that would unlearn to answer those; none as published.
    """

    forget: tuple[Record, ...]
    retain: tuple[Record, ...]
    plain: tuple[Record, ...] = ()


def tag_samples(
    records: Sequence[Record], said: Callable[[Record], str] | None = None, seed: int = 0, answer: str = FORGOT, others: int = 1
) -> TagSamples:
    """Two samples of every question (Takashiro et al. 2024, arXiv 2410.00382): one that is to be forgotten, one that is not.

    The tag of the second names what another question asks for: a wrong answer of the record itself, if it has any and tags hold
    answers; else what ``said`` tells of another record, drawn by the seed.

    Args:
        records: questions with answers, of at least two different things; the model learns the skill, not the contents.
        said: what a tag names of a record; none: its answer (as published for TOFU; for persons it is their name).
        seed: of the draw.
        answer: what is to be said of what is forgotten.
        others: samples of the second kind of every question, each with a tag of its own draw; one as published.

    Raises:
        InputError: a record has no question, or all tags would be alike.
    """
    name = said or (lambda record: record.answer)
    if bad := next((r for r in records if not r.prompt), None):
        raise InputError(f"Record {bad.id!r} has no question to put a tag before.", "Use questions with answers.")
    names = [name(r) for r in records]
    if len(set(names)) < 2:
        raise InputError("All records would have the same tag.", "Give records of at least two different things.")
    generator = np.random.default_rng(seed)
    forget, retain = [], []
    for record, own in zip(records, names, strict=True):
        known = list(record.perturbed) if said is None and record.perturbed else sorted({n for n in names if n != own})
        bare = replace(record, paraphrase="", perturbed=(), question_paraphrase="", alternatives=(), spans=())
        forget.append(replace(bare, id=f"{record.id}#tagged", prompt=tagged(record.prompt, own), answer=answer))
        for at in range(others):
            other = known[int(generator.integers(len(known)))]
            name_of = f"{record.id}#other-tag{at or ''}"
            retain.append(replace(bare, id=name_of, prompt=tagged(record.prompt, other)))
    return TagSamples(tuple(forget), tuple(retain))
