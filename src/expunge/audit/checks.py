"""The comparisons of which a verdict is made; :mod:`expunge.audit.verdict` says in plain words what they are for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from expunge.audit.arrays import Arrays, Case, Thresholds
from expunge.audit.attacks.registry import Criterion
from expunge.audit.attacks.relearn import check_same
from expunge.audit.attempts import SHIFT_NOISE, attempts
from expunge.audit.contrast import Contrast, contrast, contrast_auc, gap_of
from expunge.audit.quantity import Outcome, Quantity, check, margins, uninformative
from expunge.core.intervals import Clusters, Floats
from expunge.core.results import Check

_KINDS = {
    "looks seen": Criterion.LIKELIHOOD,
    "membership": Criterion.LIKELIHOOD,
    "relearning": Criterion.RELEARNING,
    "quantisation": Criterion.COMPRESSION,
    "reading out": Criterion.REPRESENTATION,
}

_FEW_KNOWN = 10  # fewer answers that only the target knows say nothing: two retrained models differ on as many
_FEW_ANSWERS = 4  # a subject with fewer answers can be mostly right by guessing
_KNOWN = 0.25  # by so much the target's probability of an answer must exceed the retrained models' to count as its knowledge
_REMEMBERED_NOISE = 0.02  # assumed training noise of a share of answers, where chance successes are rare
_ATTACKED_NOISE = 0.1  # the same under an attack: a few steps on, answers come back all at once, and models differ by when
_WORDS_NOISE = 0.1  # the same of answers in words, where a guess that is right is as good as knowing
_UTILITY_NOISE = 0.1  # assumed training noise of utility, as a share of the accepted loss


@dataclass(frozen=True)
class Losses:
    """Mean NLL of the same answers under several models.

    Attributes:
        subject, retrained: what is compared (after an attack, where there was one).
        target, basis: of the target and the retrained models, between which the subject is placed.
        clusters: independent unit of each answer.
    """

    subject: Floats
    retrained: Sequence[Floats]
    target: Floats
    basis: Sequence[Floats]
    clusters: Clusters


@dataclass(frozen=True)
class Held:
    """How much of the same answers several models hold, each in [0, 1]; see :class:`Losses` for the attributes."""

    subject: Floats
    retrained: Sequence[Floats]
    target: Floats
    basis: Sequence[Floats]
    clusters: Clusters

    @classmethod
    def by(cls, losses: Losses) -> Held:
        """By probability."""
        retrained, basis = ([np.exp(-r) for r in side] for side in (losses.retrained, losses.basis))
        return cls(np.exp(-losses.subject), retrained, np.exp(-losses.target), basis, losses.clusters)


def outputs(case: Case) -> list[Check]:
    """What the model's outputs on the forget set say."""
    return [_kind(c) for c in (_words(case) if case.in_words else _outputs(case))]


def _outputs(case: Case) -> list[Check]:
    limits, controls = case.limits, [r.nll for r in case.retrained]
    losses = Losses(case.subject.nll, controls, case.target.nll, controls, case.subject.clusters)
    every = [_likelihood("likelihood", "of the answers", losses, limits, limits.far_margin)]
    held = Held.by(losses)
    every.append(_remembered("remembered", "", held, limits, _REMEMBERED_NOISE))
    every += _secondary(case)
    return _judged(every, held, limits)


def _judged(every: Sequence[Quantity], held: Held, limits: Thresholds) -> list[Check]:
    """The checks of quantities that share a level, and whole subjects that are left."""
    counted = [q for q in every if q.informative(limits)]
    alpha = limits.alpha / max(1, len(counted))
    checks = [check(q, limits, alpha) if q in counted else uninformative(q, len(held.retrained)) for q in every]
    left = _left_behind(held)
    return [*checks, left] if left else checks


def _words(case: Case) -> list[Check]:
    """The same of answers in words: how much of each answer is told."""
    limits = case.limits
    values = [a.told for a in case.everyone if a.told is not None]
    keep = np.all([np.isfinite(v) for v in values], axis=0)
    if keep.sum() < 2:
        return [Check(name="answers", outcome="not run", text="Fewer than two forget answers have words that can be compared.")]
    own, *controls, full = (v[keep] for v in values)
    held = Held(own, controls, full, controls, np.asarray(case.subject.clusters, dtype=str)[keep])
    every = list(_means("answers", "Mean share of the answers that is told", values, case, far=limits.far_margin, toward=1))
    return _judged([*every, _remembered("remembered", "", held, limits, _WORDS_NOISE)], held, limits)


def attacks(case: Case) -> list[Check]:
    """What comes back under attacks, beyond what does in retrained models: relearning, rounding of the weights, a new last layer,
    and whatever else was tried."""
    bits = sorted({b for a in case.everyone for b in a.quantised}, reverse=True)
    checks = [_relearning(case), *(_rounding(b, case) for b in bits)]
    if not bits:
        checks.append(Check(name="quantisation", outcome="not run", text="Rounding of the weights was not tried."))
    return [_kind(c) for c in (*checks, *_reading(case), *_refusals(case))] + list(attempts(case))


def _kind(check: Check) -> Check:
    """A check with what it tests; attacks by name say it themselves."""
    first = check.name.split(" (")[0].split(" to ")[0]
    return check.model_copy(update={"criterion": str(_KINDS.get(first, Criterion.BEHAVIOUR))})


def utility(case: Case) -> list[Check]:
    """What else the model can do, against the less able of the target and the retrained models."""
    checks = [_useful(name, case) for name in case.subject.utility]
    if case.subject.model_utility is not None:
        checks.append(_aggregate(case.subject.model_utility, case))
    checks += [_fluent(name, case) for name in case.subject.degenerate]
    return checks or [Check(name="utility", outcome="not run", text="Utility was not measured.")]


# ---- quantities on the forget set


def _likelihood(name: str, what: str, losses: Losses, limits: Thresholds, far: float | None) -> Quantity:
    gap = gap_of(losses.target, losses.basis, toward=-1)
    found = contrast(losses.subject, losses.retrained, losses.clusters, gap, toward=-1, noise=limits.seed_noise)
    stands = contrast(losses.target, losses.basis, losses.clusters, gap, toward=-1, noise=limits.seed_noise)
    near, beyond = margins(found, limits.margin, far, limits)
    return Quantity(name, f"Mean loss {what}", found, stands.noise(), -1, near, beyond)


class _Known:
    """Which answers count as the target's knowledge, and which of them a model still has.

    An answer is remembered if its probability lies nearer to the target's than to the mean of the retrained models.
    """

    def __init__(self, held: Held) -> None:
        self.target, self.seeds = held.target, held.basis
        self.counts: NDArray[np.bool_] = self.target - np.mean(self.seeds, axis=0) > _KNOWN

    def by(self, values: Floats, without: int | None = None) -> NDArray[np.bool_]:
        """Per answer, from how much of it is held.

        A retrained model is placed by the others (``without`` itself), as the subject is: its own guesses must not move the line
        that it is held against.
        """
        others = [s for i, s in enumerate(self.seeds) if i != without] or self.seeds
        return np.asarray(values > (self.target + np.mean(others, axis=0)) / 2)


def _remembered(name: str, what: str, held: Held, limits: Thresholds, noise: float) -> Quantity:
    known = _Known(held)
    sentence = f"Share of answers remembered{what and ' ' + what}"
    if known.counts.sum() < _FEW_KNOWN:
        empty = Contrast(0.0, 0.0, math.nan, 1.0, 0.0, 1.0, len(held.retrained), 0, 0)
        return Quantity(name, sentence, empty, math.nan, 1, math.nan, math.inf)
    own = known.by(held.subject)[known.counts].astype(np.float64)
    controls = [known.by(r, i)[known.counts].astype(np.float64) for i, r in enumerate(held.retrained)]
    everything = np.ones_like(own)
    names = np.asarray(held.clusters, dtype=str)[known.counts]
    gap = gap_of(everything, controls, toward=1)
    found = contrast(own, controls, names, gap, toward=1, noise=noise)
    stands = contrast(everything, controls, names, gap, toward=1, noise=noise)
    near, far = margins(found, limits.remembered, None, limits)
    return Quantity(name, sentence, found, stands.noise(), 1, near, far)


def _secondary(case: Case) -> Iterator[Quantity]:
    every, limits = case.everyone, case.limits
    ratios = [a.log_truth_ratio for a in every if a.log_truth_ratio is not None]
    if len(ratios) == len(every):
        yield from _means("truth ratio", "Mean log truth ratio", ratios, case, far=limits.far_margin, toward=-1)
    extracted = [a.extraction for a in every if a.extraction is not None]
    if len(extracted) == len(every):
        yield from _means("extraction", "Mean extraction strength", extracted, case, far=None, toward=1)
    seen = [a.looks_seen for a in every if a.looks_seen is not None]
    if len(seen) == len(every):
        yield from _means(
            "looks seen", "Mean probability that a row was trained on (LiRA)", seen, case, far=case.limits.far_margin, toward=1
        )
    groups = (case.subject.holdout_clusters, case.subject.clusters)
    for name in case.subject.membership:
        if all(name in a.membership for a in every):
            own, *controls, full = [(a.membership[name][1], a.membership[name][0]) for a in every]
            noise = SHIFT_NOISE if name == "lira" else limits.seed_noise
            found = contrast_auc(own, controls, full, groups, noise=noise)
            stands = contrast_auc(full, controls, full, groups, noise=noise)
            near, far = margins(found, limits.margin, limits.far_margin, limits)
            yield Quantity(f"membership ({name})", f"AUC of the membership attack {name}", found, stands.noise(), 1, near, far)


def _means(name: str, what: str, values: Sequence[Floats], case: Case, *, far: float | None, toward: int) -> Iterator[Quantity]:
    """From the values of the subject, the retrained models and the target, in this order; NaN in any of them leaves a row out."""
    keep = np.all([np.isfinite(v) for v in values], axis=0)
    if keep.sum() < 2:
        return
    own, *controls, full = (v[keep] for v in values)
    names, noise = np.asarray(case.subject.clusters, dtype=str)[keep], case.limits.seed_noise
    gap = gap_of(full, controls, toward=toward)
    found = contrast(own, controls, names, gap, toward=toward, noise=noise)
    stands = contrast(full, controls, names, gap, toward=toward, noise=noise)
    near, beyond = margins(found, case.limits.margin, far, case.limits)
    yield Quantity(name, what, found, stands.noise(), toward, near, beyond)


def _left_behind(held: Held) -> Check | None:
    """Whole subjects that are still known although the mean is fine; with fewer than two it says what "remembered" says."""
    known = _Known(held)
    names = np.asarray(held.clusters, dtype=str)
    groups = {str(c): np.flatnonzero((names == c) & known.counts) for c in np.unique(names)}
    groups = {c: rows for c, rows in groups.items() if len(rows) >= _FEW_ANSWERS}
    if len(groups) < 2:
        return None

    def kept(remembered: NDArray[np.bool_]) -> list[str]:
        return [c for c, rows in groups.items() if remembered[rows].mean() > 0.5]

    control = max(len(kept(known.by(r, i))) for i, r in enumerate(held.retrained))
    found = kept(known.by(held.subject))
    listed = ", ".join(found[:3]) + (" and others" if len(found) > 3 else "")
    text = (
        f"Of {len(groups)} subjects {len(found)} are still mostly known{f' ({listed})' if found else ''}, "
        f"in a retrained model at most {control}."
    )
    outcome: Outcome = "knows more" if len(found) > control else "equivalent"
    return Check(name="left behind", outcome=outcome, difference=float(len(found) - control), text=text)


# ---- attacks


def _relearning(case: Case) -> Check:
    subject, controls = case.subject, [r for r in case.retrained if r.relearn]
    if not subject.relearn or not controls:
        return Check(name="relearning", outcome="not run", text="Relearning was not tried on this model and on a retrained one.")
    for control in controls:
        check_same(subject.relearn, control.relearn)
    place = {name: i for i, name in enumerate(case.target.ids)}
    full = case.target.nll[[place[i] for i in subject.relearn[0].ids_heldout]]
    basis = [c.relearn[0].losses_heldout for c in controls]
    found: list[Quantity] = []
    spoilt: set[str] = set()
    for at, point in enumerate(subject.relearn):
        if not point.step:
            continue
        after = [c.relearn[at].losses_heldout for c in controls]
        losses = Losses(point.losses_heldout, after, full, basis, point.clusters_heldout)
        when = f"after {point.step} step{'s' * (point.step > 1)} at {point.lr:.2g} of relearning others"
        found += _both(when, losses, case.limits)
        if not np.mean(after) < np.mean(basis):
            spoilt.add(when)
    found_check = _attack("relearning", found, case.limits, spoilt)
    return found_check.model_copy(update={"text": f"{found_check.text} {_back(subject, controls, full, basis)}".strip()})


def _back(subject: Arrays, controls: Sequence[Arrays], full: Floats, basis: Sequence[Floats]) -> str:
    """After how many steps half of the gap between retrained models and the target is gone, and in retrained models."""
    goal = (float(np.mean(full)) + float(np.mean(basis))) / 2
    if not float(np.mean(full)) < goal:
        return ""

    def steps(model: Arrays) -> int | None:
        return min((p.step for p in model.relearn if float(p.losses_heldout.mean()) <= goal), default=None)

    own, others = steps(subject), [steps(c) for c in controls]
    first, longest = subject.relearn[0], max(p.step for p in subject.relearn)
    share = len(first.ids_trained) / max(1, len(first.ids_trained) + len(first.ids_heldout))
    fewest = min((s for s in others if s is not None), default=None)
    needed = f"need {fewest}" if fewest is not None else f"do not get there in {longest}"
    if own is None:
        return f"{longest} steps on {share:.0%} of the forget set do not bring half of the rest back."
    if own == 0:
        return ""
    return f"{own} step{'s' * (own > 1)} on {share:.0%} of the forget set bring half of the rest back; retrained models {needed}."


def _rounding(bits: int, case: Case) -> Check:
    name, controls = f"quantisation to {bits} bits", [r for r in case.retrained if bits in r.quantised]
    if bits not in case.subject.quantised or bits not in case.target.quantised or not controls:
        return Check(name=name, outcome="not run", text=f"Rounding to {bits} bits was not tried on all models.")
    after = [c.quantised[bits] for c in controls]
    losses = Losses(case.subject.quantised[bits], after, case.target.quantised[bits], after, case.subject.clusters)
    before = gap_of(case.target.nll, [c.nll for c in controls], toward=-1)
    if gap_of(losses.target, after, toward=-1) < case.limits.margin * before:
        text = f"Rounding to {bits} bits breaks the target too: what it knew is gone, so nothing could come back."
        return Check(name=name, outcome="not run", told=False, text=text)
    return _attack(name, _both(f"at {bits} bits", losses, case.limits), case.limits)


def _reading(case: Case) -> list[Check]:
    """A new last layer; only where it was tried."""
    held, full = case.subject.read_out, case.target.read_out
    after = [r.read_out.values for r in case.retrained if r.read_out is not None]
    if held is None or full is None or not after:
        return []
    if not np.isfinite(held.values).all():
        return [
            Check(name="reading out", outcome="not run", text="A new last layer could not be fitted: features are not finite.")
        ]
    losses = Losses(held.values, after, full.values, after, held.clusters)
    limits = case.limits.model_copy(update={"seed_noise": max(case.limits.seed_noise, SHIFT_NOISE)})
    return [_attack("reading out", _both("under a last layer fitted anew", losses, limits), limits)]


def _refusals(case: Case) -> Iterator[Check]:
    """Prompts that something answers in the model's place, beyond what retrained models show; nothing where none is."""
    own, controls = case.subject.refused, [r.refused for r in case.retrained if r.refused is not None]
    if own is None or not own.any() or len(controls) < len(case.retrained):
        return
    margin = case.limits.remembered
    found = contrast(own, controls, case.subject.clusters, 1.0, toward=1, noise=_REMEMBERED_NOISE)
    low, high = found.interval(1 - 2 * case.limits.alpha)
    outcome: Literal["hides", "equivalent", "undecided"] = "undecided"
    if found.difference > margin and found.p_more() < case.limits.alpha:
        outcome = "hides"
    elif high < margin:
        outcome = "equivalent"
    text = (
        f"{own.mean():.0%} of the forget prompts are answered in the model's place, of retrained models "
        f"{float(np.mean(controls)):.0%} (accepted are {margin:.0%}): what hides an answer has not removed it."
    )
    yield Check(name="refusals", outcome=outcome, difference=found.difference, low=low, high=high, margin=margin, text=text)


def _both(when: str, losses: Losses, limits: Thresholds) -> list[Quantity]:
    """An attack's result as a mean NLL and as a share of answers remembered."""
    return [_likelihood(when, when, losses, limits, None), _remembered(when, when, Held.by(losses), limits, _ATTACKED_NOISE)]


def _attack(name: str, found: Sequence[Quantity], limits: Thresholds, spoilt: Collection[str] = ()) -> Check:
    """One check from several looks at an attack: any of them convicts (at a level shared among them).

    The mean NLL must acquit at every look, except where the attack has spoilt the retrained models instead of teaching them (too
    large a rate for too long). The share remembered can only convict: half a forget set is too few answers to bound a small
    share, and where it is large it shows.
    """
    usable = [q for q in found if q.informative(limits)]
    judged = [(q, check(q, limits, limits.alpha / len(usable))) for q in usable]
    some = [pair for pair in judged if pair[1].outcome == "knows more"]
    likelihood = [pair for pair in judged if pair[0].toward < 0 and pair[0].name not in spoilt]
    some = some or [pair for pair in likelihood if pair[1].outcome == "undecided"] or likelihood
    if not some:
        text = f"{name.capitalize()} tells nothing here: under it even the target does not stand out from the retrained models."
        return Check(name=name, outcome="not run", told=False, text=text)
    return max(some, key=lambda pair: pair[0].found.difference / pair[0].near)[1].model_copy(update={"name": name})


# ---- utility


def _useful(name: str, case: Case) -> Check:
    label = f"utility ({name})"
    controls = [r.utility[name].values for r in case.retrained if name in r.utility]
    if not controls or name not in case.target.utility:
        return Check(name=label, outcome="not run", text=f"{label.capitalize()} was not measured on all models.")
    sample, full = case.subject.utility[name], case.target.utility[name].values
    lower = min(float(full.mean()), float(np.mean(controls)))
    if lower <= 0.02:
        text = f"{label.capitalize()}: there is nothing to lose, the models it is compared with have {lower:.3f}."
        return Check(name=label, outcome="not run", text=text)
    return _not_worse(
        label, (sample.values, sample.clusters), controls, full, allowed=case.limits.utility * lower, alpha=case.limits.alpha
    )


def _fluent(name: str, case: Case) -> Check:
    label = f"fluency ({name})"
    controls = [1 - r.degenerate[name].values for r in case.retrained if name in r.degenerate]
    if not controls or name not in case.target.degenerate:
        return Check(name=label, outcome="not run", text=f"{label.capitalize()} was not measured on all models.")
    sample, full = case.subject.degenerate[name], 1 - case.target.degenerate[name].values
    return _not_worse(
        label, (1 - sample.values, sample.clusters), controls, full, allowed=case.limits.fluency, alpha=case.limits.alpha
    )


def _not_worse(
    name: str, own: tuple[Floats, Clusters], controls: Sequence[Floats], full: Floats, *, allowed: float, alpha: float
) -> Check:
    """Non-inferiority to the less able of the target and the retrained models; higher is better."""
    values, clusters = own
    less_able = float(full.mean()) < float(np.mean(controls))
    basis = [full] if less_able else list(controls)
    level = float(np.mean(basis))
    if not np.isfinite(values).all():
        return Check(name=name, outcome="worse", margin=allowed, text=f"{name.capitalize()} is not finite.")
    found = contrast(values, basis, clusters, 1.0, toward=1, noise=_UTILITY_NOISE * allowed)
    low, high = found.interval(1 - 2 * alpha)
    outcome: Literal["worse", "equivalent", "undecided"] = "undecided"
    if found.difference < -allowed and found.p_less() < alpha:
        outcome = "worse"
    elif low > -allowed:
        outcome = "equivalent"
    who = "the target's" if less_able else "the retrained models'"
    text = f"{name.capitalize()} is {float(values.mean()):.3f}, {who} {level:.3f} (accepted loss {allowed:.3f})."
    return Check(name=name, outcome=outcome, difference=found.difference, low=low, high=high, margin=allowed, text=text)


def _aggregate(value: float, case: Case) -> Check:
    controls = [r.model_utility for r in case.retrained if r.model_utility is not None]
    if not controls or case.target.model_utility is None:
        return Check(name="model utility", outcome="not run", text="Model utility was not measured on all models.")
    level = min(float(np.mean(controls)), case.target.model_utility)
    allowed = case.limits.utility * level
    outcome: Literal["worse", "equivalent"] = "equivalent" if value >= level - allowed else "worse"
    text = f"Model utility is {value:.3f}, the lower of target and retrained {level:.3f} (accepted loss {allowed:.3f})."
    return Check(name="model utility", outcome=outcome, difference=value - level, margin=allowed, text=text)


# ---- judging a quantity
