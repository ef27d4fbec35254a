"""The blocks in which a model looks up what is to be forgotten, found by causal tracing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, cast

import numpy as np
from pydantic import Field

from expunge.adapters.base import Adapter, Example
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.places import find_place
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.engine.tracing import Subject, trace
from expunge.methods.preparations.registry import preparation


@preparation
class CausalTrace(Preparation):
    """Chooses ``layer``, where parts leave it open: the last of the blocks in a row whose MLPs bring most of the answers back.

    The embeddings of what an example is about are made unreadable by noise; for each block its MLP's output at these tokens is
    put back, and what that brings back of the true answer's probability is its effect (Meng et al. 2022, arXiv 2202.05262). The
    subject is looked for in the prompt by the records' column ``subject``; where it does not stand there, all of it counts.
    """

    name: ClassVar[str] = "causal-trace"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET,)
    makes: ClassVar[frozenset[str]] = frozenset()
    chooses: ClassVar[frozenset[str]] = frozenset({"layer"})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.SEQUENCE, Offer.TEXT, Offer.FEATURES})

    width: int = Field(3, ge=1, description="blocks in a row whose effects are summed")
    examples: int = Field(64, ge=1, description="forget examples that are traced, at most")
    noise: float = Field(3.0, gt=0, description="noise on the subject's embeddings, in standard deviations of these")
    repeats: int = Field(2, ge=1, description="draws of the noise")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Trace.

        Raises:
            InputError: nothing stands before the answers of the forget examples.
        """
        held = list(examples[Stream.FORGET])
        order = np.random.default_rng([engine.seed, 43]).permutation(len(held))[: self.examples]
        named = [_subject(cast(LanguageAdapter, adapter), held[int(i)]) for i in sorted(order)]
        subjects = [s for s, _ in named if s is not None]
        if not subjects:
            raise InputError(
                "Nothing stands before the answers of the forget examples, so it cannot be traced where they are looked up.",
                "Give the block: preparation=none layer=NUMBER.",
            )

        def progress(done: int, total: int) -> None:
            if tell is not None:
                tell(done, total, "causal tracing")

        found = trace(
            adapter,
            subjects,
            noise=self.noise,
            repeats=self.repeats,
            seed=engine.seed,
            max_units=engine.max_tokens,
            tell=progress,
        )
        first, last = found.window(self.width)
        by_name = sum(1 for s, name in named if s is not None and name)
        effects = ", ".join(f"{e:.2f}" for e in found.effects().tolist())
        return Prepared(
            chosen={"layer": last},
            notes=(
                f"Causal tracing chose the blocks {first} to {last}: noise on what is asked about lowers the probability of the "
                f"answer from {found.clean:.2f} to {found.corrupted:.2f}, and the MLPs of the blocks bring back {effects} "
                f"(in {by_name} of {len(subjects)} examples the subject stood in the prompt, in the others all of it counted).",
            ),
        )


def _subject(adapter: LanguageAdapter, example: Example) -> tuple[Subject | None, bool]:
    """What of an example is corrupted, and whether it is its subject by name."""
    start = example.size - example.n_targets
    place = find_place(adapter, example, example.cluster)
    if place is not None and place.last < start:
        return Subject(example, tuple(range(place.first, place.last + 1))), True
    tokens = tuple(range(min(1, start - 1), start - 1))
    return (Subject(example, tokens), False) if tokens else (None, False)
