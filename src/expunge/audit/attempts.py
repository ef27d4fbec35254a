"""What attacks by name say: each compares its values on the forget examples with those of retrained models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from expunge.audit.arrays import Attempt, Case, Thresholds
from expunge.audit.contrast import contrast, gap_of
from expunge.audit.quantity import Quantity, check, margins, uninformative
from expunge.core.intervals import Clusters, Floats
from expunge.core.results import Check

SHIFT_NOISE = 0.15  #: assumed for attacks and read-outs: what is measured of all examples of a training shifts together


def attempts(case: Case) -> Iterator[Check]:
    """Attacks with one value per forget example; the level of a conviction is shared among those that tell anything."""
    quantities, kinds = {}, {}
    for name, own in case.subject.attempts.items():
        if not own.applies:
            continue
        label = f"attack ({name})"
        kinds[label] = own.criterion
        controls = [r.attempts[name].values for r in case.retrained if name in r.attempts]
        if name not in case.target.attempts or len(controls) < len(case.retrained):
            yield Check(name=label, criterion=own.criterion, outcome="not run", text=f"{own.title} was not tried on all models.")
            continue
        full = case.target.attempts[name].values
        if not own.convicts:
            yield _shown(label, own, controls, full)
            continue
        if own.certain:
            yield _certain(label, own, controls)
            continue
        keep = np.isfinite(full) & np.all(np.isfinite(controls), axis=0)
        if keep.sum() < 2:
            yield Check(
                name=label,
                criterion=own.criterion,
                outcome="not run",
                text=f"{own.title} has values for fewer than two forget examples.",
            )
        elif not np.isfinite(own.values[keep]).all():
            yield Check(
                name=label, criterion=own.criterion, outcome="undecided", text=f"{own.title} gives values that are not finite."
            )
        else:
            names = np.asarray(case.subject.clusters, dtype=str)[keep]
            values = replace(own, values=own.values[keep])
            quantities[label] = _attempt(values, [c[keep] for c in controls], full[keep], names, case.limits)
    usable = [q for q in quantities.values() if q.informative(case.limits)]
    for label, quantity in quantities.items():
        told = quantity in usable
        found = check(quantity, case.limits, case.limits.alpha / len(usable)) if told else None
        yield (found or uninformative(quantity, len(case.retrained))).model_copy(
            update={"name": label, "criterion": kinds[label]}
        )


def _shown(label: str, own: Attempt, controls: Sequence[Floats], full: Floats) -> Check:
    """What is reported and decides nothing."""
    value, gold, target = (float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for v in (own.values, controls, full))
    text = f"{own.title}: {value:.3f}, in retrained models {gold:.3f}, in the target {target:.3f}. It decides nothing."
    return Check(name=label, criterion=own.criterion, outcome="shown", text=text)


def _certain(label: str, own: Attempt, controls: Sequence[Floats]) -> Check:
    """What needs no statistics: nothing of it is accepted, so its margin is 0."""
    difference = float(np.nanmean(own.values) - np.nanmean(np.mean(controls, axis=0)))
    return Check(
        name=label, criterion=own.criterion, outcome="knows more", difference=difference, margin=0.0, falls=own.toward < 0,
        text=own.certain,
    )  # fmt: skip


def _attempt(own: Attempt, controls: Sequence[Floats], full: Floats, names: Clusters, limits: Thresholds) -> Quantity:
    """Knowing less than retrained models under an attack is no fault here: the outputs themselves are judged for that."""
    noise = max(limits.seed_noise, SHIFT_NOISE)
    gap = gap_of(full, controls, toward=own.toward)
    found = contrast(own.values, controls, names, gap, toward=own.toward, noise=noise)
    stands = contrast(full, controls, names, gap, toward=own.toward, noise=noise)
    near, far = margins(found, limits.margin, None, limits)
    return Quantity(own.title, f"{own.title}: its mean", found, stands.noise(), own.toward, near, far)
