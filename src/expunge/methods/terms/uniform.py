"""Nothing is preferred: the reversed objective of an assistant on what shall be kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term


class _Uniform(Term):
    """``KL(uniform || p) = -(1/V) sum_v log p_v - log V`` per target, at least 0; the names differ in the stream."""

    reads: ClassVar[Stream]
    reverse: ClassVar[bool] = True

    @property
    def stream(self) -> Stream:
        """The stream that the class reads."""
        return self.reads

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Logits of the current model."""
        return frozenset({(self.reads, Of.CURRENT, "logits")})

    def values(self, views: Views) -> Tensor:
        """One divergence per target, ``[N]``."""
        logits = views.current(self.reads).logits
        return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])


@term
class Uniform(_Uniform):
    """Retain predictions go to the uniform distribution: an assistant that will be subtracted must not prefer anything there.

    From ULD (Ji et al. 2024, arXiv 2406.08607). Their code averages it over all positions, prompt and padding too; here it is the
    mean over supervised targets, as all terms are.
    """

    name: ClassVar[str] = "uniform"
    reads: ClassVar[Stream] = Stream.RETAIN


@term
class AlternativeUniform(_Uniform):
    """Predictions on other answers to the forget prompts go to the uniform distribution, as those on retain data do.

    So an assistant learns the answers that are to be forgotten and not the prompts alone (ULD's wrong answers).
    """

    name: ClassVar[str] = "alternative-uniform"
    reads: ClassVar[Stream] = Stream.ALTERNATIVE
