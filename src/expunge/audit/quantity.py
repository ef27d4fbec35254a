"""One comparison of a verdict: a quantity, its margins, and what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from expunge.audit.arrays import Thresholds
from expunge.audit.contrast import Contrast
from expunge.core.results import Check

Outcome = Literal["equivalent", "knows more", "knows less", "undecided", "not run"]


@dataclass(frozen=True)
class Quantity:
    """One comparison before it is judged.

    Attributes:
        name: of the check.
        what: subject of the sentence ("mean loss of the answers").
        found: the contrast.
        noise: how far the target might lie from a further retrained model by chance (a standard error).
        toward: +1 if the quantity grows with knowledge, -1 if it falls.
        near: margin towards the target, oriented and in the quantity's unit.
        far: margin on the other side; infinite where that side means nothing.
    """

    name: str
    what: str
    found: Contrast
    noise: float
    toward: int
    near: float
    far: float

    def informative(self, limits: Thresholds) -> bool:
        """Whether the target stands out from the retrained models clearly enough for the quantity to tell anything."""
        return self.found.gap > 0 and math.isfinite(self.noise) and self.found.gap > limits.informative * self.noise


def margins(found: Contrast, share: float, far: float | None, limits: Thresholds) -> tuple[float, float]:
    """The margin towards the target, a ``share`` of the gap that may grow to the noise of training, and that on the far side."""
    near = share * found.gap
    near = max(near, min(max(limits.margin_cap, share) * found.gap, found.band(1 - limits.alpha)))
    return near, math.inf if far is None else max(far * found.gap, near)


def check(quantity: Quantity, limits: Thresholds, alpha: float) -> Check:
    """Convict at ``alpha`` one-sided, acquit by two one-sided tests at the thresholds' level, else say what would tell."""
    found, near, far = quantity.found, quantity.near, quantity.far
    if not math.isfinite(found.difference):
        return Check(name=quantity.name, outcome="undecided", text=f"{quantity.what} is not a finite number.")
    low, high = found.interval(1 - 2 * limits.alpha)
    outcome: Outcome = "undecided"
    if found.difference > near and found.p_more() < alpha:
        outcome = "knows more"
    elif found.difference < -far and found.p_less() < alpha:
        outcome = "knows less"
    elif -far < low and high < near:
        outcome = "equivalent"
    signs = quantity.toward
    bounds = (low, high) if signs > 0 else (-high, -low)
    own = signs * found.difference
    text = (
        f"{quantity.what} differs from the retrained models' by {own:+.3f} [{bounds[0]:+.3f}, {bounds[1]:+.3f}], "
        f"{found.share:.0%} of the way to the target; accepted are {near:.3f} towards it"
        f"{'' if math.isinf(far) else f' and {far:.3f} away from it'}.{_advice(quantity, outcome, limits)}"
    )
    return Check(
        name=quantity.name, outcome=outcome, difference=own, low=bounds[0], high=bounds[1], margin=near, falls=signs < 0,
        text=text,
    )  # fmt: skip


def _advice(quantity: Quantity, outcome: Outcome, limits: Thresholds) -> str:
    if outcome != "undecided":
        return ""
    found = quantity.found
    room = min(quantity.near - found.difference, quantity.far + found.difference)
    if room <= 0:
        return (
            " The difference is larger than accepted, but chance could explain it: more subjects or retrained models would tell."
        )
    kind, number = found.needed(room, 1 - 2 * limits.alpha)
    return (
        f" The interval is too wide: about {number} {'subjects' if kind == 'subjects' else 'retrained models'} would be needed."
    )


def uninformative(quantity: Quantity, k: int) -> Check:
    """A quantity by which even the target cannot be told from ``k`` retrained models."""
    models = "the retrained model" if k == 1 else "retrained models"
    text = f"{quantity.what} tells nothing here: by it even the target cannot be told from {models}, given the noise."
    return Check(name=quantity.name, outcome="not run", told=False, text=text)
