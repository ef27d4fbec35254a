"""Questions behind a tag that names what is to be forgotten, from which a model learns to obey the tag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.adapters.language import LanguageAdapter
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.subject_names import subject_names
from expunge.data.tags import FORGOT, TAGS, tag_samples
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.registry import preparation


@preparation
class Tagged(Preparation):
    """The forget records behind tags: their own, with "forgot" for an answer, and those of others, with the true answer.

    Of every question one sample is to be forgotten: its tag holds what is asked for, and its other answer is the one word that
    the model is to say. ``others`` samples are to be answered: their tags hold what another record asks for, and they go to the
    retain set (Takashiro et al. 2024, arXiv 2410.00382). The retain records themselves stay as they are, without a tag.
    """

    name: ClassVar[str] = "tagged"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.ALTERNATIVE})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.SEQUENCE, Offer.TEXT})
    added_tokens: ClassVar[tuple[str, ...]] = TAGS

    holds: Literal["names", "answers"] = Field(
        "names", description="what a tag holds: the subject's name, or the answer (a wrong one of the record for the other tags)"
    )
    others: int = Field(4, ge=1, le=64, description="samples of every question behind the tag of another one (published: 1)")
    plain: bool = Field(True, description="also teach the questions without a tag, so that they are answered as before")

    def rewritten(
        self, forget: Sequence[Record], retain: Sequence[Record], seed: int
    ) -> tuple[Sequence[Record], Sequence[Record]]:
        """The tagged forms of the forget records: those to be forgotten, and those to be answered with the retain records.

        Raises:
            InputError: a record is no question, a subject has no name that could stand in a tag, or all tags would be alike.
        """
        said = None
        if self.holds == "names":
            names = subject_names(forget, retain)
            if bare := sorted(s for s, held in names.items() if not held):
                raise InputError(
                    f"No name stands for the subject {bare[0]!r}: no capitalised words that half of its records hold and no "
                    "retain record.",
                    "Use preparation.holds=answers, or name the subject in its questions.",
                )

            def said(record: Record) -> str:
                return names[record.cluster][0]

        made = tag_samples(forget, said, seed, others=self.others)
        own = [replace(s, answer=r.answer) for s, r in zip(made.forget, forget, strict=True)]
        return own, [*made.retain, *(forget if self.plain else ()), *retain]

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """The other answer to the tagged questions.

        Raises:
            InputError: the tokenizer lacks the tag, or an example has none.
        """
        if not isinstance(adapter, LanguageAdapter) or TAGS[0] not in adapter.tokenizer.get_vocab():
            raise InputError("The tokenizer lacks the tag.", "Give the model its tokens: expunge.adapters.added.with_tokens.")
        mark = adapter.tokenizer.convert_tokens_to_ids(TAGS[0])
        for example in examples[Stream.FORGET]:
            if mark not in set(example.data.ids[: example.data.start].tolist()):
                raise InputError(f"The example {example.id!r} has no tag.", "Encode what `rewritten` makes of the records.")
        made = [adapter.replace(e, answer=FORGOT, suffix="#forgot") for e in examples[Stream.FORGET]]
        return Prepared({Stream.ALTERNATIVE: made})
