"""One corpus of all records, those to forget among them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from expunge.adapters.base import Adapter
from expunge.core.access import Offer, Stream
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.registry import preparation


@preparation
class Corpus(Preparation):
    """The retain examples and, after them, the forget examples: for terms on unmarked targets, which leave out what is to go."""

    name: ClassVar[str] = "corpus"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.RETAIN})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT})

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Join them."""
        return Prepared({Stream.RETAIN: [*examples[Stream.RETAIN], *examples[Stream.FORGET]]})
