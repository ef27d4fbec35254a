"""A loss term and a method made of it."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Paper, Recipe, Term, Views
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method, term
from expunge.methods.terms.likelihood import NLL


@term
class Unlikelihood(Term):
    """``-log(1 - p)`` of every forget token: bounded below by 0, steep where the model is sure."""

    name: ClassVar[str] = "unlikelihood"
    stream: ClassVar[Stream] = Stream.FORGET

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Losses under the current model."""
        return frozenset({(Stream.FORGET, Of.CURRENT, "losses")})

    def values(self, views: Views) -> Tensor:
        """``-log(1 - exp(-loss))``, ``[N]``."""
        losses = views.current(Stream.FORGET).losses.clamp_min(1e-6)
        return -torch.log(-torch.expm1(-losses))


@method(
    "example-method",
    title="Unlikelihood training",
    paper=Paper(
        "Neural Text Generation with Unlikelihood Training", "Sean Welleck and others", 2019, "https://arxiv.org/abs/1908.04319"
    ),
    formula="L = -mean_tokens log(1 - p)(forget) + NLL(retain)",
    published=Fixed(lr=1e-5, epochs=5),
)
def example() -> Recipe:
    """Make every token of the forget answers unlikely, one by one."""
    return compose("example-method", forget=[Unlikelihood()], retain=[NLL()])
