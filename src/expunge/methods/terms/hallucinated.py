"""Terms on what a model has written itself: names that do not exist are made unlikely, all around them is held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term
from expunge.methods.terms.distribution import Divergence


@term
class Unlikelihood(Term):
    """``-log(1 - p(y))`` of each forget target, at least 0: the token is made unlikely (Welleck et al. 2019, arXiv 1908.04319).

    Its gradient with respect to the logits is ``p(y)`` for the token and ``-p(y) p(v) / (1 - p(y))`` for another one, so it is
    bounded by the token's probability and ends where the token is no longer said: unlike ascent it needs no stop. It is computed
    as a difference of two logarithms of sums, ``log sum_v e^z(v) - log sum_(v != y) e^z(v)``, which is right up to p = 1.
    """

    name: ClassVar[str] = "unlikelihood"

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
        others = view.logits.scatter(1, view.targets[:, None], -torch.inf)
        return view.logits.logsumexp(-1) - others.logsumexp(-1)


@term
class ForgetKL(Divergence):
    """Forward divergence ``KL(p_ref || p)`` on forget targets that are to stay as they are: those around what is marked.

    The same as ``kl`` on the forget set. With ``targets=all`` it works against what is to be forgotten.
    """

    name: ClassVar[str] = "forget-kl"
    reads: ClassVar[Stream] = Stream.FORGET
