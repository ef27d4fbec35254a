"""A divergence between two kinds of answers, in probability space: FLAT."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Adapter, Example, Outputs
from expunge.core.access import Of, Stream
from expunge.engine.gradients import fitting
from expunge.engine.options import Engine
from expunge.engine.parts import Need, Term, Views
from expunge.engine.preparation import Examples
from expunge.methods.registry import term

Function = Callable[[Tensor], Tensor]

_FLAT_BELOW = 1e-3  #: probability of the template at the start under which there is next to no gradient towards it
_ASKED = 128  #: template answers that are looked at for it, at most
_LN2 = math.log(2.0)

#: By name the optimal variational function g and its conjugate of it, u -> f*(g(u)) (Nowozin et al. 2016, arXiv 1606.00709).
DIVERGENCES: dict[str, tuple[Function, Function]] = {
    "total-variation": (lambda v: v.tanh() / 2, lambda u: u.tanh() / 2),
    "kl": (lambda v: v, lambda u: (u - 1).exp()),
    "jensen-shannon": (lambda v: _LN2 - (-v).exp().log1p(), lambda u: u + (-u).exp().log1p() - _LN2),
    "pearson": (lambda v: v, lambda u: u + u.square() / 4),
    "reverse-kl": (lambda v: -(-v).exp(), lambda u: u - 1),
    "squared-hellinger": (lambda v: 1 - (-v).exp(), lambda u: u.exp() - 1),
    "neyman": (lambda v: 1 - (-v).exp(), lambda u: 2 - 2 * (-u / 2).exp()),
    "jeffrey": (lambda v: v, lambda u: u + u.square() / 4 + u.pow(3) / 16),
}


@term
class FDivergence(Term):
    """``-g(P_e) + f*(g(P_f))`` (Wang et al. 2024, arXiv 2410.11143): from the forget answers to the template answers.

    ``P`` is the mean *probability* (not log-probability) of the targets of an answer, of the template answers ``P_e`` and of the
    forget answers ``P_f``; g and f* belong to the f-divergence whose variational lower bound is raised. All are bounded, since P
    is in [0, 1]; the total variation is within 0.381 of 0.

    ``mean`` says what P is averaged over. ``batch``, as in the authors' code: the divergence is that of the means over all
    labelled targets of the step, which must fit into one forward pass. ``padded`` is the code's scaling to the letter: the sum is
    divided by *all* positions of the step, prompt and padding included, so a short template counts less than a long answer, and
    the loss depends on the padding. ``example`` takes the divergence of each pair by itself.

    The conjugates are those of the theory, with g rising. Of three divergences the authors' code has others, with which
    no results are published: by its signs ``reverse-kl`` and ``squared-hellinger`` would *raise* the forget answer and lower the
    template, and ``neyman`` would lower both. Those are not offered. ``jeffrey`` is, as in the code, the series of the conjugate
    up to the third power.
    """

    name: ClassVar[str] = "f-divergence"
    per: ClassVar[Literal["target", "example", "token"]] = "example"
    whole: ClassVar[bool] = True

    divergence: Literal[
        "total-variation", "kl", "jensen-shannon", "pearson", "reverse-kl", "squared-hellinger", "neyman", "jeffrey"
    ] = Field("total-variation", description="which f-divergence between template and forget answers is raised")
    mean: Literal["batch", "padded", "example"] = Field(
        "batch", description="over what probabilities are averaged: labelled targets of the step, all its positions, each pair"
    )
    length: int | None = Field(
        None, ge=1, description="of mean=padded: positions of an example that count; none: those of the longest in the step"
    )

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    def joint(self) -> bool:
        """A pair by itself needs no other."""
        return self.mean != "example"

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Losses of both kinds of answers under the current model."""
        return frozenset({(Stream.FORGET, Of.CURRENT, "losses"), (Stream.ALTERNATIVE, Of.CURRENT, "losses")})

    def values(self, views: Views) -> Tensor:
        """One value per example, ``[B]``; but for ``mean=example`` all are the same."""
        rises, conjugate = DIVERGENCES[self.divergence]
        forget, template = (views.current(s) for s in (Stream.FORGET, Stream.ALTERNATIVE))
        pairs = forget.n_examples
        value = conjugate(self._probability(forget, pairs)) - rises(self._probability(template, pairs))
        return value.expand(pairs)

    def _probability(self, view: Outputs, pairs: int) -> Tensor:
        """P: a scalar, or of each pair ``[B]``, the mean over its templates if there are several."""
        p = (-view.losses).exp()
        if self.mean == "batch":
            return p.sum() / max(1, len(p))
        if self.mean == "padded":
            length = self.length or max(view.token_counts) - 1
            return p.sum() / max(1, length * view.n_examples)
        return (view.per_example(p) / view.lengths()).reshape(pairs, -1).mean(1)

    def remarks(self, adapter: Adapter, examples: Examples, engine: Engine) -> tuple[str, ...]:
        """A warning where the template has next to no probability at the start."""
        asked = list(examples.get(Stream.ALTERNATIVE, ()))[:_ASKED]
        found = mean_probability(adapter, asked, engine.max_tokens)
        if found >= _FLAT_BELOW or not asked:
            return ()
        return (
            f"The target gives the template answers a mean probability of {found:.1e} per target: below {_FLAT_BELOW:g} the loss "
            "has next to no slope towards them, and may drive both answers to 0 instead. Take templates that the model would "
            "say, or teach them first (idk-nll).",
        )


def mean_probability(adapter: Adapter, examples: Sequence[Example], max_units: int) -> float:
    """Mean probability of all targets under the adapter's model, [0, 1]; 0 without examples."""
    total, count = 0.0, 0
    device = next(adapter.model.parameters()).device
    with torch.no_grad():
        for part in fitting(examples, max_units):
            losses = adapter.forward(adapter.model, adapter.collate(part).to(device), frozenset({"losses"})).losses
            total, count = total + float((-losses).exp().sum()), count + len(losses)
    return total / max(1, count)
