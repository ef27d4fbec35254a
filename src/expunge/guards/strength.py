"""How strong a corruption must be: found beforehand by zeroth-order descent (ECO, Liu et al. 2024, arXiv 2406.07933).

A corrupted model is asked the forget prompts at a strength and measured: ``v(sigma)``. Sought is the strength at which it scores
what a model would that never saw them, ``v_r`` (chance for multiple choice, a chosen similarity for texts): the paper minimises
``|v(sigma) - v_r|``. No gradient goes through the model:

- one strength: ``g = (l(sigma + eps) - l(max(sigma - eps, 1e-8))) / (2 eps)``, ``sigma <- max(sigma - lr g, least)``;
- one for each dimension: along a random unit vector ``u``, ``g = (l(sigma + eps u) - l(sigma - eps u)) / (2 eps) u``.

The published script (rule ``repo``) minimises the raw metric instead and stops once it is below a bound, so that it may run past
what a model that never knew would score. Constants are the script's: rate 100, step 0.0999, beginning and least strength 0.1, ten
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.core.settings import Settings
from expunge.guards.actions.corrupt import Corrupt
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Answer, Ask, Decoder, Sampling
from expunge.guards.detectors.always import Always
from expunge.guards.parts import Material
from expunge.guards.policy import Policy, Row
from expunge.guards.prompts import put
from expunge.guards.target import Target

_LEAST_BACK = 1e-8

#: From answers to forget prompts, in their order, to what is measured of them.
Measure = Callable[[Sequence[Answer]], float]


class Descent(Settings):
    """Zeroth-order descent on a strength, with the published constants."""

    name: ClassVar[str] = "descent"

    rule: Literal["paper", "repo"] = Field("paper", description="distance to the surrogate, or the raw metric down to a bound")
    lr: float = Field(100.0, gt=0, description="rate")
    eps: float = Field(0.0999, gt=0, description="half the distance between the two strengths that are tried")
    start: float = Field(0.1, gt=0, description="strength to begin with")
    least: float = Field(0.1, gt=0, description="smallest strength")
    steps: int = Field(10, ge=1, description="steps at most")
    stop: float = Field(0.02, ge=0, description="paper: ends at this distance from the surrogate; repo: below surrogate + stop")
    seed: int = Field(0, ge=0, description="of directions")


@dataclass(frozen=True)
class Strength:
    """What was found.

    Attributes:
        sigma: the best strength that was measured.
        value: of the metric there.
        tried: all strengths that were measured, with their values, in order.
    """

    sigma: float | tuple[float, ...]
    value: float
    tried: tuple[tuple[float | tuple[float, ...], float], ...]


def descend(value: Callable[[NDArray[np.float64]], float], surrogate: float, how: Descent, size: int | None = None) -> Strength:
    """Descend from ``how.start``.

    Args:
        value: the metric of strengths ``[size]``, or ``[1]`` for one strength.
        surrogate: what a model that never saw the prompts would score.
        how: rule and constants.
        size: strengths; none: one.

    Returns:
        The strength whose value is nearest to the surrogate (rule ``paper``) or least (``repo``) of all that were measured.

    Raises:
        InputError: a value is no number.
    """
    tried: list[tuple[NDArray[np.float64], float]] = []

    def measured(sigma: NDArray[np.float64]) -> float:
        found = float(value(sigma))
        if not np.isfinite(found):
            raise InputError(f"The metric is {found} at strength {sigma.mean():g}.", "Use one that is always a number.")
        tried.append((sigma, found))
        return loss(found)

    def loss(found: float) -> float:
        return abs(found - surrogate) if how.rule == "paper" else found

    rng = np.random.default_rng(how.seed)
    sigma = np.full(size or 1, how.start)
    bound = how.stop if how.rule == "paper" else surrogate + how.stop
    for _ in range(how.steps):
        if size is None:
            direction = np.ones(1)
        else:
            direction = rng.standard_normal(size)
            direction /= np.linalg.norm(direction)
        forward = measured(np.maximum(sigma + how.eps * direction, _LEAST_BACK))
        if forward < bound:
            break
        backward = measured(np.maximum(sigma - how.eps * direction, _LEAST_BACK))
        sigma = np.maximum(sigma - how.lr * (forward - backward) / (2 * how.eps) * direction, how.least)
    if not tried or loss(tried[-1][1]) >= bound:
        measured(sigma)  # where the last step led
    best = min(tried, key=lambda t: loss(t[1]))

    def told(held: NDArray[np.float64]) -> float | tuple[float, ...]:
        return float(held[0]) if size is None else tuple(held.tolist())

    return Strength(told(best[0]), best[1], tuple((told(s), v) for s, v in tried))


def strength(
    adapter: LanguageAdapter, action: Corrupt, prompts: Sequence[str | Conversation], measure: Measure, *,
    surrogate: float, key: bytes, how: Descent | None = None, targets: Sequence[Target] = (), sampling: Sampling | None = None,
    batch: int = 16, vector: bool = False,
) -> Strength:  # fmt: skip
    """The strength of a corruption by noise, for a model and forget prompts.

    Use it as ``action.model_copy(update={"sigma": found.sigma})``. Noise follows from the key, so it is to be that of the guard.
    The prompts should not be those by which the guard is judged.

    Args:
        adapter: the model.
        action: family, dimensions and mask; a family with noise.
        prompts: about the targets.
        measure: of their answers.
        surrogate: what a model that never saw them would score.
        key: of the guard.
        how: the descent; none: the published one.
        targets: whose names are marked.
        sampling: of answers; none: the likeliest tokens, 32 at most.
        batch: prompts at a time.
        vector: a strength for each of ``action.dims`` dimensions.

    Raises:
        InputError: no prompts, a family without noise, or no ``dims`` for a vector.
    """
    if not prompts:
        raise InputError("There are no prompts to find a strength on.", "Give some that are about the targets.")
    if not action.family.startswith("noise"):
        raise InputError(f"The family {action.family!r} has no strength.", "Choose noise-first, noise-random or noise-top.")
    if vector and action.dims is None:
        raise InputError("A strength for each dimension needs their number.", "Give dims.")
    given = [Conversation.of(p) for p in prompts]
    chosen, decoder = sampling or Sampling(max_tokens=32), Decoder(adapter)

    def value(sigma: NDArray[np.float64]) -> float:
        one: float | tuple[float, ...] = tuple(sigma.tolist()) if vector else float(sigma[0])
        made = type(action)(**{**{k: getattr(action, k) for k in type(action).model_fields}, "sigma": one})
        policy = Policy([Row(detector=Always(), action=made)], Material(list(targets), key=key, adapter=adapter))
        asks = [Ask(plan, put(adapter, plan.conversation), chosen) for plan in map(policy.open, given)]
        return measure([a for at in range(0, len(asks), batch) for a in decoder.answer(asks[at : at + batch])])

    return descend(value, surrogate, how or Descent(), action.dims if vector else None)
