"""The verdict: forgotten, suppressed, not forgotten or damaged, by comparison with models that never saw the forget set.

What is asked, in plain words and in this order (the first that applies decides):

1. **No gold standard** - there is no retrained model. Nothing is said, least of all "forgotten".
2. **Damaged** - losses are not finite; or utility is below the lower of the target's and the retrained models' by more than its
   margin; or generations degenerate more often. A model that answers nothing any more is no success, whatever its forget loss.
3. **Undecided** - the target itself cannot be told from the retrained models on the forget answers: there is nothing to forget
   that these measurements could see.
4. **Not forgotten** - on some quantity the model differs from the retrained models towards the target, by more than the margin
   and by more than a further retrained model would by chance; or a whole subject is still known.
5. **Suppressed** - its outputs do not give it away, but after the same short relearning of *other* subjects, or the same
   rounding of weights, or (of classifiers) under a last layer fitted anew on its features, or under another attack that was
   asked for, it knows more than the retrained models do after it.
6. **Damaged, over-unlearned** - it knows less than a model that never saw the data, by more than the far margin: a conspicuous
   hole is not what retraining leaves, and it betrays who was forgotten.
7. **Undecided** - an interval is too wide for the margin, or utility or attacks were not measured.
8. **Forgotten** - none of these: the primary quantities are *equivalent* (their 90 % intervals lie within the margins, two
   one-sided tests), and under every attack that was run the excess over the retrained models is shown to be within the margin.
   Failing to find a difference is never enough.

Quantities on the forget set. Primary: ``likelihood``, the mean NLL of the answers; ``remembered``, the share of answers whose
probability lies nearer to the target's than to the retrained models'. The second is needed because a mean can hide: 40 % of
the answers known by heart and the rest pushed far away have the mean NLL of a retrained model. Secondary (they can convict, not
acquit): truth ratio, extraction, membership attacks, and ``left behind``, subjects of at least four answers of which most are
remembered, where no retrained model remembers any.

For rows there is a third primary quantity where reference models were trained: ``looks seen``, how much likelier a row's margin
is under models that saw the row than under models that did not (LiRA). Of rows drawn at random a network may be as sure without
having seen them; the mean NLL then tells nothing, and only this does. One of both must tell the target from retrained models.

**Below the weights.** Who audits with less than the weights can convict and not acquit: weights that nobody touches may hold what
they do not say. Where log-probabilities are had too, all is as above but the last verdict, and *undecided* says that no more can
be shown. Where answers in words are all there is, no likelihood, truth ratio, extraction or membership is read. Primary are
``answers``, the mean share of the words of each answer that the greedy answer tells (ROUGE-L recall), and ``remembered``, the
share of answers of which it tells as much as the target, or nearly; ``left behind`` convicts as before. An answer that something
gives *in the model's place* (``refusals``: a guard says so, or the server marks it) is neither knowledge nor forgetting: where a
share of the forget prompts is answered so beyond what retrained models do, the model is at best *suppressed*. So is one whose
files hold the target unchanged, which the auditor sees who has the files.

Margins are shares of the gap between target and retrained models on the same quantity, so that they mean the same for every
model size. On the knowing side the margin grows to the prediction band of one further retrained model where several seeds
show that training noise is that large, up to a cap. On the far side it is wider, since NLL has no upper end and grows there
without much changing what the model says. A quantity on which even the target does not stand out is left out. Retrained
models differ from each other as a whole (each guesses in its own way); with one of them this noise cannot be measured and is
assumed, and the text says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from expunge.audit import checks
from expunge.audit.arrays import Arrays, Case, Sample, Thresholds
from expunge.audit.protocol import PRIMARY, AuditProtocol
from expunge.core.access import Level
from expunge.core.errors import InputError
from expunge.core.results import Check, Judgement, Verdict

__all__ = ["PRIMARY", "Arrays", "Sample", "Thresholds", "judge"]

_FAR = (
    "likelihood",
    "answers",
    "truth ratio",
    "membership",
    "looks seen",
)  #: quantities whose far side convicts of over-unlearning
_HAD = {Level.SCORES: "with answers and log-probabilities alone", Level.TEXT: "with answers in words alone"}
_BELOW = "its weights may still hold what it does not say."
_TELLING = ("likelihood", "answers", "looks seen")  #: one of these must tell target and retrained models apart


def judge(
    subject: Arrays,
    retrained: Sequence[Arrays],
    target: Arrays,
    thresholds: Thresholds | None = None,
    *,
    protocol: AuditProtocol | None = None,
    access: Level = Level.WEIGHTS,
) -> Judgement:
    """Judge one model; the module's docstring says how.

    Args:
        subject: the model that is judged (an unlearned one, the target itself, or a further retrained one).
        retrained: models trained without the forget set; never the subject itself.
        target: the model trained on everything.
        thresholds: defaults if none are given.
        protocol: what it says of its criteria: those that only report decide nothing, those that need no conviction do not
            have to be shown equivalent. None: every attack that was run must acquit.
        access: what was had of the models; below the weights nothing can be called forgotten.

    Raises:
        InputError: the arrays are not about the same examples, or a retrained model or the target has losses that are not finite.
    """
    limits = thresholds or Thresholds()
    written = {k: float(v) for k, v in limits.model_dump().items()}
    if not retrained:
        return Judgement(
            verdict=Verdict.NO_GOLD,
            reason="There is no retrained model to compare with, so nothing can be said about forgetting.",
            thresholds=written,
        )
    _validate(subject, retrained, target)
    case = Case(subject, tuple(retrained), target, limits)
    utility = checks.utility(case)
    if not case.in_words and not np.isfinite(subject.nll).all():
        broken = Check(
            name="likelihood", outcome="worse", text="Losses on the forget answers are not finite: the model is destroyed."
        )
        return Judgement(verdict=Verdict.DAMAGED, reason=broken.text, checks=(broken, *utility), thresholds=written)
    outputs = checks.outputs(case)
    attacks = checks.attacks(case)
    soft = protocol.kinds("no conviction") if protocol is not None else frozenset()
    quiet = protocol.kinds("report") if protocol is not None else frozenset()
    told = [c for c in outputs if c.criterion not in quiet], [c for c in attacks if c.criterion not in quiet]
    verdict, reason = _decide(*told, utility, limits, soft, below=access is not Level.WEIGHTS)
    if verdict is Verdict.FORGOTTEN and access is not Level.WEIGHTS:
        verdict = Verdict.UNDECIDED
        reason = f"Asked, it gives itself away by nothing, and {_HAD[access]} no more can be shown: {_BELOW} {reason}"
    note = _noise_note(len(retrained), limits)
    return Judgement(
        verdict=verdict, reason=f"{reason} {note}".strip(), checks=(*outputs, *attacks, *utility), thresholds=written
    )


def _decide(
    outputs: Sequence[Check], attacks: Sequence[Check], utility: Sequence[Check], limits: Thresholds, soft: frozenset[str],
    *, below: bool,
) -> tuple[Verdict, str]:  # fmt: skip
    more = [c for c in outputs if c.outcome == "knows more"]
    worse = [c for c in utility if c.outcome == "worse"]
    if worse:
        also = f" It also still knows: {more[0].text}" if more else ""
        return Verdict.DAMAGED, f"Utility is lost: {_worst(worse).text}{also}"
    means = [c for c in outputs if c.name in _TELLING]
    if all(c.outcome == "not run" for c in means):
        return Verdict.UNDECIDED, means[-1].text
    if more:
        return Verdict.NOT_FORGOTTEN, f"It still knows what retrained models do not: {_worst(more).text}"
    back = [c for c in attacks if c.outcome == "knows more"]
    hidden = [c for c in attacks if c.outcome == "hides"]
    if hidden and not back:
        return Verdict.SUPPRESSED, f"It is kept from answering, and what stands behind is not shown: {hidden[0].text}"
    if back:
        return Verdict.SUPPRESSED, f"Its outputs hide what its weights still hold: {_worst(back).text}"
    less = [c for c in outputs if c.outcome == "knows less" and c.name.startswith(_FAR)]
    if less:
        return (
            Verdict.DAMAGED,
            f"Over-unlearned, not private: it can be told from models that never saw the data: {_worst(less).text}",
        )
    return _acquit(outputs, attacks, utility, limits, soft, below=below)


def _acquit(
    outputs: Sequence[Check], attacks: Sequence[Check], utility: Sequence[Check], limits: Thresholds, soft: frozenset[str],
    *, below: bool,
) -> tuple[Verdict, str]:  # fmt: skip
    open_checks = [c for c in (*outputs, *attacks) if c.outcome == "undecided"]
    blocking = [c for c in open_checks if (c.name in PRIMARY or c in attacks) and c.criterion not in soft]
    if blocking:
        return Verdict.UNDECIDED, f"The evidence is too thin to tell: {blocking[0].text}"
    if all(c.outcome == "not run" for c in utility):
        return Verdict.UNDECIDED, "Its outputs are like those of retrained models, but utility was not measured."
    run = [c for c in attacks if c.outcome not in ("not run", "shown")]
    if not run and limits.require_attacks and not below and not _by_rows(outputs, attacks):
        return Verdict.UNDECIDED, "Its outputs are like those of retrained models, but no attack on its weights was run."
    thin = [c.name for c in (*open_checks, *(c for c in utility if c.outcome == "undecided"))]
    open_text = f" Not settled: {', '.join(thin)}." if thin else ""
    held = " and ".join(c.name for c in run)
    weakest = max((c for c in (*outputs, *attacks) if c.outcome == "equivalent" and c.margin), key=_nearness)
    text = f"It cannot be told from retrained models at the stated margins{f', nor under {held}' if held else ''}."
    if not held and not below:
        text += " (Under the attacks on weights that were tried even the target cannot be told from them.)"
    return Verdict.FORGOTTEN, f"{text} Weakest link: {weakest.text}{open_text}"


def _by_rows(outputs: Sequence[Check], attacks: Sequence[Check]) -> bool:
    """Whether single rows acquit where attacks were tried and say nothing.

    Training on some of the rows that were drawn at random teaches nothing about the others; relearning is no test there.
    """
    seen = any(c.name == "looks seen" and c.outcome == "equivalent" for c in outputs)
    return seen and any("tells nothing" in c.text for c in attacks)


def _worst(found: Sequence[Check]) -> Check:
    """The check whose difference is largest in units of its margin; what is accepted to no extent comes first."""

    def severity(check: Check) -> float:
        if check.margin == 0:
            return math.inf
        if check.difference is None or check.margin is None:
            return 1.0
        return abs(check.difference) / check.margin

    return max(found, key=severity)


def _nearness(check: Check) -> float:
    """How near the interval of a check that acquitted comes to the margin on the knowing side, in units of the margin."""
    bound = -(check.low or 0.0) if check.falls else check.high or 0.0
    return bound / (check.margin or 1.0)


def _noise_note(k: int, limits: Thresholds) -> str:
    if k > 1:
        return ""
    return (
        f"With one retrained model the noise of training is unknown; it was taken as {limits.seed_noise:.0%} of the gap "
        "(three or more retrained models would show it)."
    )


def _validate(subject: Arrays, retrained: Sequence[Arrays], target: Arrays) -> None:
    n = len(target.ids)
    for other in (subject, *retrained, target):
        if list(other.ids) != list(target.ids) or list(other.clusters) != list(target.clusters):
            raise InputError(f"{other.label!r} and {target.label!r} were not measured on the same forget examples.")
        if (other.told is None) != (target.told is None):
            raise InputError(f"{other.label!r} and {target.label!r} were not measured with the same access.")
        said = [other.nll] if other.told is None else [other.told, other.refused]
        columns = [*said, other.log_truth_ratio, other.extraction, *(m[0] for m in other.membership.values())]
        if any(c is not None and len(c) != n for c in (*columns, *other.quantised.values())):
            raise InputError(f"The measurements of {other.label!r} differ in length from its {n} forget examples.")
        if any(len(m[1]) != len(other.holdout_clusters) for m in other.membership.values()):
            raise InputError(f"The membership scores of {other.label!r} differ in length from its holdout examples.")
        if other is not subject and not np.isfinite(other.nll).all():
            raise InputError(
                f"The losses of {other.label!r} are not finite; it cannot serve for comparison.",
                "Train it again, with a smaller rate.",
            )
    if n < 2:
        raise InputError("A verdict needs at least two forget examples.")
