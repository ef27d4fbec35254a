"""A hinge on probabilities: the true class gives way to its best rival."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term


@term
class InvertedHinge(Term):
    """Inverted hinge loss (Cha et al. 2024, arXiv 2408.06621): ``1 + p(y) - max_{v != y} p(v)`` of every forget target.

    On probabilities, not on logits, so it is in [0, 2] and the hinge ``max(0, .)`` of the paper never binds: near 2 where the
    target is known by heart, 1 where the true token and its best rival are alike, 0 where the rival is certain. The gradient on
    the logits is ``p_y (1 - p_y + p_r)`` on the true token, ``-p_r (1 - p_r + p_y)`` on the rival r, and ``p_v (p_r - p_y)`` on
    any other, which is small: what gives way goes to one token, not to all.
    """

    name: ClassVar[str] = "inverted-hinge"

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Logits of the current model."""
        return frozenset({(Stream.FORGET, Of.CURRENT, "logits")})

    def values(self, views: Views) -> Tensor:
        """One value per target, ``[N]``."""
        view = views.current(Stream.FORGET)
        p, true = view.logits.softmax(-1), view.targets.unsqueeze(1)
        rival = p.scatter(1, true, 0.0).amax(1)
        return 1 + p.gather(1, true).squeeze(1) - rival
