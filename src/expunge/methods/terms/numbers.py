"""Terms on predicted numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term


@term
class IncompetentError(Term):
    """Forget predictions go to those of a network that has never seen the rows, ``|m - m_incompetent|`` (Tarun et al. 2023,
    arXiv 2210.08196).

    It is the absolute difference whatever loss the regressor was trained with.
    """

    name: ClassVar[str] = "incompetent-error"

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Predictions of both networks."""
        return frozenset((Stream.FORGET, of, "numbers") for of in (Of.CURRENT, Of.INCOMPETENT))

    def values(self, views: Views) -> Tensor:
        """Absolute difference of each row, in the unit of the target, ``[N]``."""
        return (views.current(Stream.FORGET).numbers - views.incompetent(Stream.FORGET).numbers).abs()
