"""Which examples are hardest to forget: a worst-case forget set for a given model, by bi-level selection.

A random forget set is mild: a method that passes on it may fail on another of the same size. Fan et al. 2024, *Challenging
Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning*, arXiv 2403.07362. With a weight w in [0, 1] for each unit
(an example, or all examples of a class or person) and ``sum w = m``:

- lower level, unlearning given w: ``theta_u(w)`` is reached from the target model by steps ``theta <- theta - lr sign(g)``
  with g the gradient of ``sum_i (1 - w_i) l_i``. The sign's derivative is 0 nearly everywhere: theta_u counts as constant in w;
- upper level: ``min_w sum_i w_i l_i(theta_u) + gamma |w|^2``. The hardest units are those whose loss stays LOW although they were
  left out: they are answered from the others, and look as if they had not been forgotten.

Where we differ from the official code: its weights begin as the indicator of a random set, and with its own step size one upper
step then leaves that very set at the top. Here all weights begin at ``m / n``, so the first step already follows the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from scipy.optimize import brentq
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example
from expunge.adapters.passes import evaluating
from expunge.core.errors import Destroyed, InputError
from expunge.core.settings import Settings
from expunge.data.order import BatchPlan
from expunge.engine.gradients import fitting, moving
from expunge.engine.objective import mean_losses

Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]  #: (upper steps done, of how many)


class Selection(Settings):
    """How a worst-case forget set is looked for.

    The defaults are the paper's for single rows; for classes it takes outer 20, epochs 1, lr 5e-5, step 1e-4, penalty 1e-4.
    """

    name: ClassVar[str] = "worst-case"

    outer: int = Field(2, ge=1, description="upper steps, each after unlearning anew from the target model")
    epochs: int = Field(2, ge=1, description="passes over all examples to unlearn")
    batch: int | None = Field(256, ge=1, description="examples per step of unlearning; none: all")
    lr: float = Field(1e-3, gt=0, description="by how much each weight of the model moves in a step")
    step: float = Field(0.01, gt=0, description="size of an upper step")
    penalty: float = Field(0.0, ge=0, description="gamma: how much the weights of units are held together")
    goal: Literal["hardest", "easiest"] = Field("hardest", description="hardest: low loss after unlearning; easiest: high")
    seed: int = Field(0, ge=0, description="of the order of examples")


@dataclass(frozen=True)
class UpperStep:
    """What one upper step saw.

    Attributes:
        objective: ``sum_u w_u l_u / m`` after unlearning with the weights from before the step, in nats for classifiers.
        loss: mean loss of the units that lead after the step, measured before it.
        kept: share of them that led before it, [0, 1]; in the first step NaN, because all weights were equal.
    """

    objective: float
    loss: float
    kept: float


@dataclass(frozen=True)
class WorstCase:
    """A forget set and how it was found.

    Attributes:
        ids: of the chosen examples.
        examples: their indices, ascending.
        units: the chosen units, ascending: examples, or groups.
        weights: of all units, [0, 1]; they sum to the number chosen.
        curve: the upper steps.
    """

    ids: tuple[str, ...]
    examples: npt.NDArray[np.int64]
    units: npt.NDArray[np.int64]
    weights: Floats
    curve: list[UpperStep] = field(default_factory=list)


def worst_case(
    adapter: Adapter,
    examples: Sequence[Example],
    count: int,
    how: Selection,
    *,
    groups: Sequence[int] | None = None,
    max_units: int = 8192,
    progress: Progress | None = None,
) -> WorstCase:
    """The ``count`` units that are hardest (or easiest) to forget; the adapter's model is left as it is.

    The found set depends on the lower level, fine-tuning on the rest, and on the target model.

    Args:
        adapter: holds the target model.
        examples: all that it was trained on.
        count: m, how many units to choose.
        how: the settings.
        groups: the unit of each example, counted from 0 (its class, its person); none: each is its own. The loss of a unit is
            the mean over its examples.
        max_units: cost of the examples in one forward pass, at most.
        progress: called after every upper step.

    Raises:
        InputError: not more units than are to be chosen, or a group without examples.
        Destroyed: unlearning made losses NaN or infinite.
    """
    owner = np.arange(len(examples)) if groups is None else np.asarray(groups, dtype=np.int64)
    sizes = _sizes(owner, len(examples))
    if not 1 <= count < len(sizes):
        raise InputError(f"{count} of {len(sizes)} units cannot be chosen.", f"Give a number in [1, {len(sizes) - 1}].")
    working = adapter.copy()
    start = {name: value.clone() for name, value in working.model.state_dict().items()}
    weights = np.full(len(sizes), count / len(sizes))
    curve: list[UpperStep] = []
    leading: npt.NDArray[np.int64] | None = None
    for step in range(how.outer):
        working.model.load_state_dict(start)
        _unlearn(working, examples, 1 - weights[owner], how, max_units)
        losses = np.bincount(owner, mean_losses(working, working.model, examples, max_units)) / sizes
        if not np.isfinite(losses).all():
            raise Destroyed("Unlearning made losses NaN or infinite.", "Choose a smaller lr.")
        slope = losses if how.goal == "hardest" else -losses
        objective = float(weights @ losses / count)
        weights = project(weights - how.step * (slope + 2 * how.penalty * weights), count)
        now = _top(weights, slope, count)
        kept = float("nan") if leading is None else float(np.isin(now, leading).mean())
        curve.append(UpperStep(objective, float(losses[now].mean()), kept))
        leading = now
        if progress is not None:
            progress(step + 1, how.outer)
    units = np.sort(leading if leading is not None else np.zeros(0, np.int64))
    chosen = np.flatnonzero(np.isin(owner, units))
    return WorstCase(tuple(examples[int(i)].id for i in chosen), chosen, units, weights, curve)


def project(point: Floats, total: float) -> Floats:
    """The nearest point whose entries lie in [0, 1] and sum to ``total``: ``clip(a - mu, 0, 1)`` with the mu that makes it so.

    Args:
        point: a ``[n]``, finite.
        total: in [0, n].

    Raises:
        InputError: the total is out of range.
    """
    if not 0 <= total <= len(point):
        raise InputError(f"{len(point)} numbers in [0, 1] cannot sum to {total}.")
    low, high = float(point.min()) - 1, float(point.max())
    mu = brentq(lambda m: np.clip(point - m, 0, 1).sum() - total, low, high, xtol=1e-15, rtol=1e-14)
    return np.asarray(np.clip(point - mu, 0, 1))


def _top(weights: Floats, slope: Floats, count: int) -> npt.NDArray[np.int64]:
    """The units of largest weight; of equal ones, as at the bounds, those whose loss says more, then the first."""
    return np.lexsort((np.arange(len(weights)), slope, -weights))[:count]


def _sizes(owner: npt.NDArray[np.int64], examples: int) -> npt.NDArray[np.int64]:
    if len(owner) != examples:
        raise InputError(f"There are {examples} examples and {len(owner)} groups.", "Give one for each example.")
    if examples and owner.min() < 0:
        raise InputError("Groups count from 0.")
    sizes = np.bincount(owner)
    if not sizes.all():
        raise InputError(f"The group {int(np.flatnonzero(sizes == 0)[0])} has no examples.", "Number the groups without gaps.")
    return sizes


def _unlearn(adapter: Adapter, examples: Sequence[Example], weights: Floats, how: Selection, max_units: int) -> None:
    """Sign descent of the weighted loss, in the same order at every upper step; examples of weight 0 are not looked at."""
    parameters = moving(adapter.model)
    seen = np.flatnonzero(weights > 0)
    size = min(how.batch or len(seen), len(seen))
    plan = BatchPlan({"all": len(seen)}, {"all": size}, seed=how.seed, steps=how.epochs * -(-len(seen) // size))
    with evaluating(adapter.model), torch.enable_grad():
        for batch in plan:
            gradients = _gradient(adapter, examples, weights, seen[batch["all"]], max_units)
            with torch.no_grad():
                for name, gradient in gradients.items():
                    parameters[name].sub_(gradient.sign(), alpha=how.lr)


def _gradient(
    adapter: Adapter, examples: Sequence[Example], weights: Floats, chosen: npt.NDArray[np.int64], max_units: int
) -> dict[str, Tensor]:
    """Gradient of the weighted sum of the examples' mean losses per target."""
    model: nn.Module = adapter.model
    parameters = moving(model)
    device = next(iter(parameters.values())).device
    weight = {id(examples[i]): weights[i] for i in chosen}
    total: dict[str, Tensor] = {}
    for part in fitting([examples[i] for i in chosen], max_units):
        outputs = adapter.forward(model, adapter.collate(part).to(device), frozenset({"losses"}))
        means = outputs.per_example(outputs.losses) / outputs.lengths()
        factors = torch.tensor([weight[id(e)] for e in part], dtype=means.dtype, device=means.device)
        found = torch.autograd.grad((means * factors).sum(), list(parameters.values()), allow_unused=True)
        for name, g in zip(parameters, found, strict=True):
            if g is not None:
                total[name] = total[name] + g if name in total else g
    return total
