"""What a guard is told to hide: names, examples, topics, skills."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import ClassVar

from pydantic import Field, field_validator

from expunge.core.errors import InputError
from expunge.core.settings import Settings
from expunge.guards.folding import words

_LEAST = 3  #: letters of a term, where each stands for a sound; shorter ones match too much
_LONGEST = 200  #: letters of a term: what is held back of a stream grows with it


class Shown(Settings):
    """A question about the target, and what the model says of it."""

    name: ClassVar[str] = "example"

    prompt: str = Field("", description="how it is asked for")
    answer: str = Field("", description="what is to be hidden")


class Target(Settings):
    """One thing to hide.

    Detectors read the parts that they understand: names are matched as they are, examples and topics by likeness, skills by the
    states that probe texts leave.
    """

    name: ClassVar[str] = "target"

    id: str = Field("", description="opaque name, given by the registry; it stands in logs, so it must say nothing")
    entities: tuple[str, ...] = Field((), description="names and aliases that must be neither asked about nor said")
    examples: tuple[Shown, ...] = Field((), description="questions and answers, as they were learnt")
    topics: tuple[str, ...] = Field((), description="what it is about, a sentence each")
    skills: tuple[str, ...] = Field((), description="names of skills for which probe texts are at hand")
    until: datetime | None = Field(None, description="when it ends; none: never")

    @field_validator("entities", "topics", "skills", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @property
    def questions(self) -> list[str]:
        """How it is asked for: prompts of examples, and topics."""
        return [*(e.prompt for e in self.examples if e.prompt), *self.topics]

    def summary(self) -> str:
        """What there is, without saying what: for logs."""
        parts = [
            (len(self.entities), "name"),
            (len(self.examples), "example"),
            (len(self.topics), "topic"),
            (len(self.skills), "skill"),
        ]
        return ", ".join(f"{n} {w}{'s' * (n != 1)}" for n, w in parts if n) or "nothing"


def check_target(target: Target, ordinary: Sequence[str] = (), share: float = 0.2) -> None:
    """Refuse a target that hides nothing, or nearly everything.

    Args:
        target: as it was asked for.
        ordinary: prompts that must be answered; a term that occurs in more than ``share`` of them is refused.
        share: largest share of ordinary prompts that a term may occur in.

    Raises:
        InputError: it is empty, a term is too short, too long or no word at all, or a term is too common.
    """
    if not (target.entities or target.examples or target.topics or target.skills):
        raise InputError("The target is empty: nothing is said of what to forget.", "Give entities, examples, topics or skills.")
    for at, term in enumerate(target.entities):
        folded = "".join(words(term))
        where = f"Entity {at + 1} of the target"
        if not folded:
            raise InputError(f"{where} has no letter or digit.", "Give a name, or leave it out.")
        if len(folded) < _LEAST and folded.isascii():
            raise InputError(
                f"{where} has {len(folded)} letter(s): it would match much that is meant to stay.", "Give the full name."
            )
        if len(folded) > _LONGEST:
            raise InputError(f"{where} has {len(folded)} letters; at most {_LONGEST} can be held back.", "Give it as an example.")
        hits = sum(_holds(text, folded) for text in ordinary)
        if ordinary and hits > max(1, share * len(ordinary)):
            raise InputError(
                f"{where} stands in {hits} of {len(ordinary)} ordinary prompts: hiding it would refuse them all.",
                "Give a name that says whom or what is meant.",
            )
    for at, shown in enumerate(target.examples):
        if not shown.prompt.strip() and not shown.answer.strip():
            raise InputError(f"Example {at + 1} of the target is empty.", "Give a prompt, an answer, or both.")


def _holds(text: str, folded: str) -> bool:
    found = words(text)
    return any(
        folded == "".join(found[i:j]) for i in range(len(found)) for j in range(i + 1, min(len(found), i + len(folded)) + 1)
    )


def unique_ids(targets: Iterable[Target]) -> None:
    """Refuse targets that share an id.

    Raises:
        InputError: two do, or one has none.
    """
    seen: set[str] = set()
    for target in targets:
        if not target.id:
            raise InputError("A target has no id.", "Give each an id of its own.")
        if target.id in seen:
            raise InputError(f"Two targets have the id {target.id!r}.", "Give each an id of its own.")
        seen.add(target.id)
