"""Relearning as an attack: does a little training on one half of the forget set bring the *other* half back?

A copy is fine-tuned for a few steps on half of the forget set, split by clusters (persons, books), and the loss on the other
half is measured along the way. Facts about other people cannot be learnt from the first half, so what returns in the other
half was never gone. A retrained model under the same budget is the control, for it too learns the style of the answers
(Hu et al. 2024, arXiv 2406.13356; Lynch et al. 2024, arXiv 2402.16835).

**The step sizes must be the same for all models that are compared.** :meth:`RelearnSettings.resolved` chooses them once, from
the target model; :func:`relearn` refuses to run before that. There are two by default, since one can hide much: a small model
unlearnt by NPO gave nothing back at a step size that taught the trained half, and a third of it at a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.core.intervals import Clusters
from expunge.core.settings import Settings
from expunge.core.statistics import Interval, bootstrap_means
from expunge.engine.balance import FixedBalance
from expunge.engine.gradient import Plain
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.engine.parameters import AllParameters
from expunge.engine.parts import Need, Parameters, Recipe, Term, Views
from expunge.engine.schedule import Fixed

Floats = NDArray[np.float64]


class RelearnSettings(Settings):
    """The budget of the attacker, the same for every model of an audit."""

    steps: tuple[int, ...] = Field((1, 2, 5, 10, 20), description="optimiser steps at which the loss is measured, ascending")
    batch: int = Field(16, ge=1, description="examples per step")
    rates: tuple[float, ...] = Field((), description="learning rates of AdamW; none: from the target's weights, by relative")
    relative: tuple[float, ...] = Field(
        (0.1, 0.4), description="changes of a layer's output by one step, relative to its size, from which the rates follow"
    )
    material: Literal["forget-half", "retain"] = Field(
        "forget-half", description="what is trained on: half of the forget set, or retain examples (benign fine-tuning)"
    )
    max_tokens: int = Field(8192, ge=64, description="padded input tokens per forward pass")

    @field_validator("steps")
    @classmethod
    def _ascending(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or steps[0] < 1 or list(steps) != sorted(set(steps)):
            raise ValueError("steps must be positive and ascending")
        return steps

    @field_validator("rates", "relative")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(not v > 0 for v in values):
            raise ValueError("every value must be positive")
        return values

    def resolved(self, target: Adapter) -> RelearnSettings:
        """The same settings with the learning rates fixed, from the target model where none is given."""
        if self.rates:
            return self
        return self.model_copy(update={"rates": tuple(rate(target.model, r) for r in self.relative)})


@dataclass(frozen=True)
class RelearnPoint:
    """A model after some steps of relearning.

    Attributes:
        step: optimiser steps done; the first point of each learning rate is step 0.
        lr: learning rate.
        losses_trained: mean NLL per example of what is trained on, aligned with ``ids_trained``.
        losses_heldout: mean NLL per example of the other half, aligned with ``ids_heldout`` and ``clusters_heldout``.
    """

    step: int
    lr: float
    losses_trained: Floats
    losses_heldout: Floats
    ids_trained: tuple[str, ...]
    ids_heldout: tuple[str, ...]
    clusters_heldout: tuple[str, ...]


class Likelihood(Term):
    """Negative log-likelihood of what is relearnt."""

    name: ClassVar[str] = "relearn"

    @property
    def stream(self) -> Stream:
        """What is trained on is given as the retain set."""
        return Stream.RETAIN

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Losses of the current model."""
        return frozenset({(Stream.RETAIN, Of.CURRENT, "losses")})

    def values(self, views: Views) -> Tensor:
        """One per target."""
        return views.current(Stream.RETAIN).losses


def relearning(schedule: Fixed, parameters: Parameters | None = None) -> Recipe:
    """Plain training of all parameters, or of those chosen, on what is given as the retain set."""
    return Recipe(
        name="relearn",
        retain=(Likelihood(),),
        parameters=parameters or AllParameters(),
        gradient=Plain(),
        balance=FixedBalance(),
        schedule=schedule,
    )


def rate(model: nn.Module, relative: float) -> float:
    """The learning rate at which one AdamW step changes the output of a linear layer by about ``relative`` of its size.

    AdamW moves every weight by about the learning rate, whatever the gradient's size. On an input that such a move is aligned
    with, a layer of fan-in ``d`` and weights of root mean square ``w`` then changes by ``lr * d`` where its output is about
    ``w * sqrt(d)``, so the relative change is ``lr * sqrt(d) / w``; the rule solves for ``lr`` and takes the median over layers.
    At 0.05 it gives about 2e-5 for a model of a billion parameters and 5e-4 for one of a million, which is what such models are
    fine-tuned with.

    Raises:
        InputError: the model has no linear weight.
    """
    scales = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            fan_in = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
            size = float(weight.detach().float().pow(2).mean().sqrt())
            if size > 0:
                scales.append(size / math.sqrt(fan_in))
    if not scales:
        raise InputError("The model has no linear weight from which a step size could follow.", "Give relearn.rates.")
    return relative * float(np.median(scales))


def split(examples: Sequence[Example], seed: int) -> tuple[list[int], list[int]]:
    """Indices of the half to train on and of the half to measure, by whole clusters (by examples if there is only one cluster).

    Clusters are taken in random order, each for the half that has fewer examples; so both halves are about equal.

    Raises:
        InputError: there are fewer than two examples.
    """
    if len(examples) < 2:
        raise InputError("Relearning needs at least two examples to forget: one half is trained on, the other measured.")
    members: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        members.setdefault(example.cluster, []).append(index)
    groups = list(members.values()) if len(members) > 1 else [[i] for i in range(len(examples))]
    order = np.random.default_rng([seed, 11]).permutation(len(groups))
    halves: tuple[list[int], list[int]] = ([], [])
    for at in order:
        halves[0 if len(halves[0]) < len(halves[1]) else 1].extend(groups[int(at)])
    return sorted(halves[0]), sorted(halves[1])


def relearn(
    adapter: Adapter,
    forget: Sequence[Example],
    retain: Sequence[Example] | None,
    settings: RelearnSettings,
    seed: int,
    *,
    parameters: Parameters | None = None,
) -> list[RelearnPoint]:
    """Attack a copy of the model.

    Args:
        adapter: holds the model; left unchanged.
        forget: encoded forget set, the same and in the same order for every model.
        retain: examples for ``material="retain"``; otherwise not read.
        settings: with the learning rates fixed, see :meth:`RelearnSettings.resolved`.
        seed: of the split and of the order of training; the same for every model.
        parameters: what moves; none: everything.

    Returns:
        One point per learning rate and recorded step, step 0 first. With ``material="retain"`` the whole forget set is the half
        that is measured.

    Raises:
        InputError: no learning rate is fixed, too few examples, or no retain examples where they are asked for.
    """
    if not settings.rates:
        raise InputError(
            "Relearning needs the same learning rates for all models.",
            "Take settings.resolved(target) once, or give relearn.rates.",
        )
    trained, heldout = _halves(forget, retain, settings, seed)
    more: dict[str, Any] = {"settings": settings, "seed": seed, "parameters": parameters}
    return [p for lr in settings.rates for p in _curve(adapter.copy(), lr, trained, heldout, **more)]


def _curve(
    copy: Adapter,
    lr: float,
    trained: Sequence[Example],
    heldout: Sequence[Example],
    *,
    settings: RelearnSettings,
    seed: int,
    parameters: Parameters | None,
) -> list[RelearnPoint]:
    """Train ``copy`` in place and measure it on the way."""
    points: list[RelearnPoint] = []

    def observe(step: int, model: nn.Module) -> None:
        if step and step not in settings.steps:
            return
        training = model.training
        model.eval()
        losses = mean_losses(copy, model, [*trained, *heldout], settings.max_tokens)
        model.train(training)
        found = np.asarray(losses, dtype=np.float64)
        points.append(_point(step, lr, found, trained, heldout))

    schedule = Fixed(
        lr=lr, steps=settings.steps[-1], epochs=None, batch=settings.batch, warmup=0, decay="constant", weight_decay=0
    )
    recipe = relearning(schedule, parameters)
    device = str(next(copy.model.parameters()).device)
    engine = Engine(seed=seed, max_tokens=settings.max_tokens, checkpoint_every=0, device="cpu" if device == "cpu" else "auto")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        train(copy, recipe, {Stream.RETAIN: trained}, engine, observe=observe)
    return points


@dataclass(frozen=True)
class Recovery:
    """How much of the forgotten a model has recovered after some steps.

    Attributes:
        step, lr: of the attack.
        share: ``rho(s)`` with its interval over clusters: 0 where it is no better than retrained models under the same attack,
            1 where it is back at the target's level.
    """

    step: int
    lr: float
    share: Interval


def recovered(
    unlearned: Sequence[RelearnPoint],
    retrained: Sequence[Sequence[RelearnPoint]],
    target: Mapping[str, float],
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Recovery]:
    """Recovered fraction on the half that was not trained on, ``rho(s) = (m_unl(s) - m_ret(s)) / (m_full - m_ret(0))``.

    ``m`` is the mean log-likelihood, ``m_ret`` its mean over the retrained models. The interval is a paired cluster bootstrap of
    the ratio; it is about the choice of examples, not about the seeds of retraining.

    Args:
        unlearned, retrained: curves of :func:`relearn` with the same settings, seed and examples.
        target: mean NLL per example of the target model before any relearning, by example id.
        draws, level, seed: of the bootstrap.

    Raises:
        InputError: there is no retrained curve, or the curves are not about the same steps and examples.
    """
    if not retrained:
        raise InputError("A recovered fraction needs at least one retrained model under the same attack.")
    for curve in retrained:
        check_same(unlearned, curve)
    full = np.array([target[i] for i in unlearned[0].ids_heldout])
    start = np.mean([c[0].losses_heldout for c in retrained], axis=0)
    out = []
    for at, point in enumerate(unlearned):
        control = np.mean([c[at].losses_heldout for c in retrained], axis=0)
        arrays = (control - point.losses_heldout, start - full)
        clusters: Clusters = point.clusters_heldout
        share = bootstrap_means([(arrays, clusters)], _ratio, draws=draws, level=level, seed=seed)
        out.append(Recovery(point.step, point.lr, share))
    return out


def check_same(a: Sequence[RelearnPoint], b: Sequence[RelearnPoint]) -> None:
    """Check that two curves can be compared.

    Raises:
        InputError: they differ in steps, learning rate or examples.
    """
    same = len(a) == len(b) and all(
        (p.step, p.lr, p.ids_heldout, p.ids_trained) == (q.step, q.lr, q.ids_heldout, q.ids_trained)
        for p, q in zip(a, b, strict=False)
    )
    if not same:
        raise InputError(
            "Two relearning curves differ in steps, learning rate or examples.",
            "Attack every model with the same settings and seed.",
        )


def _ratio(means: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(means[:, 1] > 0, means[:, 0] / means[:, 1], np.nan)


def _halves(
    forget: Sequence[Example], retain: Sequence[Example] | None, settings: RelearnSettings, seed: int
) -> tuple[list[Example], list[Example]]:
    if settings.material == "retain":
        if not retain or not forget:
            raise InputError(
                "Relearning on retain examples needs some, and a forget set to measure.", "Use material=forget-half."
            )
        return list(retain), list(forget)
    trained, heldout = split(forget, seed)
    return [forget[i] for i in trained], [forget[i] for i in heldout]


def _point(step: int, lr: float, losses: Floats, trained: Sequence[Example], heldout: Sequence[Example]) -> RelearnPoint:
    return RelearnPoint(
        step,
        lr,
        losses[: len(trained)],
        losses[len(trained) :],
        tuple(e.id for e in trained),
        tuple(e.id for e in heldout),
        tuple(e.cluster for e in heldout),
    )


def packed(points: Sequence[RelearnPoint]) -> dict[str, NDArray[Any]]:
    """A curve as arrays, for a cache."""
    return {
        "step": np.array([p.step for p in points]),
        "lr": np.array([p.lr for p in points]),
        "losses_trained": np.stack([p.losses_trained for p in points]),
        "losses_heldout": np.stack([p.losses_heldout for p in points]),
        "ids_trained": np.array(points[0].ids_trained, dtype=str),
        "ids_heldout": np.array(points[0].ids_heldout, dtype=str),
        "clusters_heldout": np.array(points[0].clusters_heldout, dtype=str),
    }


def unpacked(held: Mapping[str, NDArray[Any]]) -> list[RelearnPoint]:
    """The curve of :func:`packed`."""
    ids = {n: tuple(held[n].tolist()) for n in ("ids_trained", "ids_heldout", "clusters_heldout")}
    rows = zip(held["step"].tolist(), held["lr"].tolist(), held["losses_trained"], held["losses_heldout"], strict=True)
    return [RelearnPoint(step, lr, a.astype(np.float64), b.astype(np.float64), **ids) for step, lr, a, b in rows]
