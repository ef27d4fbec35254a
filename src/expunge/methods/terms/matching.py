"""Terms that draw the model's scores to those of a model that never saw the forget set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term


class Matching(Term):
    """``||z - z_oracle||^2`` of each target, summed over classes; the names differ in the stream."""

    reads: ClassVar[Stream]

    @property
    def stream(self) -> Stream:
        """The stream that the class reads."""
        return self.reads

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Logits of the current model and of the oracle."""
        return frozenset({(self.reads, Of.CURRENT, "logits"), (self.reads, Of.ORACLE, "logits")})

    def values(self, views: Views) -> Tensor:
        """Squared distance of each target, ``[N]``."""
        return (views.current(self.reads).logits - views.oracle(self.reads).logits).square().sum(-1)


@term
class ForgetMatching(Matching):
    """Scores on the forget set go to the oracle's: ``||z - z_oracle||^2`` (Georgiev et al. 2024, arXiv 2410.23232)."""

    name: ClassVar[str] = "forget-match"
    reads: ClassVar[Stream] = Stream.FORGET


@term
class RetainMatching(Matching):
    """Scores on the retain set go to the oracle's: ``||z - z_oracle||^2`` (Georgiev et al. 2024, arXiv 2410.23232)."""

    name: ClassVar[str] = "retain-match"
    reads: ClassVar[Stream] = Stream.RETAIN
