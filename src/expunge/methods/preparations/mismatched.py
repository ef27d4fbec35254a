"""Several answers to each forget prompt that have nothing to do with it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.registry import preparation


@preparation
class RandomAnswers(Preparation):
    """Each forget prompt with K answers of retain examples, drawn at random (Yao et al. 2023, arXiv 2310.10683).

    The pool are the answers of the retain set ("normal" answers). They are drawn once per forget example, without repetition and
    from other clusters than its own, and stay for the whole run; the published code draws K anew in every step, the same for
    all prompts of a batch. An answer is taken token by token and ends where the context does.
    """

    name: ClassVar[str] = "random-answers"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.ALTERNATIVE})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.SEQUENCE, Offer.TEXT})

    answers: int = Field(5, ge=1, le=64, description="K, answers to each forget prompt")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Draw the answers.

        Raises:
            InputError: fewer than K retain examples are of another cluster.
        """
        rng = np.random.default_rng([engine.seed, 29])
        pool = list(examples[Stream.RETAIN])
        made: list[Example] = []
        for example in examples[Stream.FORGET]:
            chosen = self._draw(example, pool, rng)
            made += [adapter.replace(example, answer=other, suffix=f"#random{k}") for k, other in enumerate(chosen)]
        return Prepared({Stream.ALTERNATIVE: made})

    def _draw(self, example: Example, pool: list[Example], rng: np.random.Generator) -> list[Example]:
        found: dict[int, Example] = {}
        for _ in range(32 * self.answers):
            at = int(rng.integers(len(pool)))
            if pool[at].cluster != example.cluster:
                found[at] = pool[at]
            if len(found) == self.answers:
                return list(found.values())
        raise InputError(
            f"There are fewer than {self.answers} retain examples whose answers have nothing to do with {example.id!r}.",
            "Give a larger retain set, or fewer: preparation.answers=1.",
        )
