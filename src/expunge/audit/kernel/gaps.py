"""Distances to a retrained model in accuracies and outputs: the five metrics, AUS, ToW, NoMUS, activation distance, ZRF, AIN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from expunge.audit.kernel.arrays import Floats, codes, finite, hits, matrix, same_length, share, vector
from expunge.core.errors import InputError


def accuracy(hit: ArrayLike) -> float:
    """Share of examples predicted right, in [0, 1].

    Raises:
        InputError: there is no example, or a value is neither 0 nor 1.
    """
    return float(hits(hit, "hits").mean())


@dataclass(frozen=True)
class FiveMetrics:
    """UA, MIA-efficacy, RA, TA and RTE of *Model Sparsity Can Simplify Machine Unlearning* (Jia et al. 2023).

    None of them is good or bad by itself: each is read as a gap to the retrained model (:func:`average_gap`).

    Attributes:
        unlearning_accuracy: UA, one minus the accuracy on the forget set, [0, 1]. A retrained model has about its test error on a
            random forget set and 1 on a whole class.
        mia_efficacy: share of the forget set that an attacker calls non-member, [0, 1]
            (:func:`~expunge.audit.kernel.membership.svc_efficacy`); higher is more forgotten, and a retrained model is below 1.
        retain_accuracy: RA, accuracy on the retain set, [0, 1].
        test_accuracy: TA, accuracy on test data, [0, 1]; of the remaining classes where a class was forgotten.
        seconds: RTE, wall-clock time of the unlearning alone; None if it was not measured.
    """

    unlearning_accuracy: float
    mia_efficacy: float
    retain_accuracy: float
    test_accuracy: float
    seconds: float | None = None


def five_metrics(
    hit_forget: ArrayLike, hit_retain: ArrayLike, hit_test: ArrayLike, mia_efficacy: float, seconds: float | None = None
) -> FiveMetrics:
    """The five metrics of one model from its hits ``[examples]`` on the forget set, the retain set and test data.

    Raises:
        InputError: a set is empty, a hit is neither 0 nor 1, or the efficacy is out of range.
    """
    efficacy = share(mia_efficacy, "MIA-efficacy")
    return FiveMetrics(1 - accuracy(hit_forget), efficacy, accuracy(hit_retain), accuracy(hit_test), seconds)


def gaps(unlearned: FiveMetrics, retrained: FiveMetrics) -> dict[str, float]:
    """Unlearned minus retrained, by metric, each in [-1, 1]; 0 is the target. Time is not compared."""
    names = ("unlearning_accuracy", "mia_efficacy", "retain_accuracy", "test_accuracy")
    return {name: getattr(unlearned, name) - getattr(retrained, name) for name in names}


def average_gap(unlearned: FiveMetrics, retrained: Sequence[FiveMetrics]) -> float:
    """Mean absolute gap over UA, MIA-efficacy, RA and TA to the means of the retrained models, in [0, 1]; lower is better.

    Another retrained model does not have 0 but the spread between seeds: report that value beside it.

    Raises:
        InputError: there is no retrained model.
    """
    if not retrained:
        raise InputError("A gap needs at least one retrained model.")
    found = [gaps(unlearned, r) for r in retrained]
    return float(np.mean([abs(np.mean([f[name] for f in found])) for name in found[0]]))


def adaptive_unlearning_score(
    test_original: float, test_unlearned: float, forget_unlearned: float, setting: Literal["class", "random"]
) -> float:
    """AUS ``= (1 - (A_t^orig - A_t^u)) / (1 + Delta)`` (DUCK, Cotogni et al. 2023); higher is better.

    Delta is the accuracy on the forget set for a forgotten class (its target is 0) and its distance to the test accuracy for a
    random forget set. About 1 for a retrained model: the score needs none, and so cannot tell it from over-forgetting that keeps
    the accuracies. Range [0, 2]: above 1 only if the test accuracy rises.

    Args:
        test_original, test_unlearned: test accuracies before and after, [0, 1]; of the remaining classes in the class setting.
        forget_unlearned: accuracy on the forget set after, [0, 1].
        setting: whether a class or a random set was forgotten.

    Raises:
        InputError: an accuracy is out of range.
    """
    before, after = share(test_original, "test accuracy"), share(test_unlearned, "test accuracy")
    forget = share(forget_unlearned, "forget accuracy")
    delta = forget if setting == "class" else abs(forget - after)
    return (1 - (before - after)) / (1 + delta)


def tug_of_war(unlearned: tuple[float, float, float], retrained: tuple[float, float, float]) -> float:
    """ToW ``= (1-|dA_F|)(1-|dA_R|)(1-|dA_T|)`` (RUM, Zhao et al. 2024), in [0, 1]; higher is better.

    1 for the retrained model itself; another seed of it is below 1.

    Args:
        unlearned, retrained: accuracies on forget set, retain set and test data, [0, 1].

    Raises:
        InputError: an accuracy is out of range.
    """
    product = 1.0
    for name, mine, theirs in zip(("forget", "retain", "test"), unlearned, retrained, strict=True):
        product *= 1 - abs(share(mine, f"{name} accuracy") - share(theirs, f"{name} accuracy"))
    return product


def tug_of_war_mia(unlearned: tuple[float, float, float], retrained: tuple[float, float, float]) -> float:
    """ToW-MIA: :func:`tug_of_war` with the MIA-efficacy in the place of the accuracy on the forget set.

    Args:
        unlearned, retrained: MIA-efficacy (:func:`~expunge.audit.kernel.membership.svc_efficacy`), retain and test accuracy, [0,
            1].
    """
    return tug_of_war(unlearned, retrained)


def forgetting_score(mia_accuracy: float) -> float:
    """``|MIA - 0.5|``, in [0, 0.5]; lower is better (MUFAC prints it under the heading MIA).

    An attack that is right in 0.3 and one in 0.7 of the cases count the same. A retrained model is above 0 if the forget set and
    the unseen data differ in distribution.

    Raises:
        InputError: the accuracy is out of range.
    """
    return abs(share(mia_accuracy, "accuracy of the attack") - 0.5)


def nomus(test_accuracy: float, mia_accuracy: float, weight: float = 0.5) -> float:
    """NoMUS ``= w A_test + (1-w)(1 - 2|MIA - 0.5|)`` (Choi and Na 2023), in [0, 1]; higher is better.

    1 only for perfect test accuracy and an attack at chance. The retrained model is NOT its maximiser: it rewards any model whose
    attack sits at 0.5.

    Args:
        test_accuracy: of the task, [0, 1].
        mia_accuracy: of the attack on the loss, forget against unseen
            (:func:`~expunge.audit.kernel.membership.logistic_attack`), [0, 1].
        weight: of utility, [0, 1].

    Raises:
        InputError: a number is out of range.
    """
    w = share(weight, "weight")
    return w * share(test_accuracy, "test accuracy") + (1 - w) * (1 - 2 * forgetting_score(mia_accuracy))


def activation_distance(first: ArrayLike, second: ArrayLike) -> float:
    """Mean L2 distance of the predicted probabilities of two models, in [0, sqrt(2)]; lower is nearer (Golatkar et al. 2021).

    Between two retrained models it is above 0; that is the floor. NaN if a probability is.

    Args:
        first, second: probabilities ``[examples, classes]`` of the same examples.

    Raises:
        InputError: the shapes differ, an array is empty, or rows are not distributions.
    """
    p, q = _distributions(first, second)
    return float(np.linalg.norm(p - q, axis=1).mean())


def jensen_shannon(first: ArrayLike, second: ArrayLike) -> Floats:
    """Jensen-Shannon divergence of each pair of rows in bits, ``[examples]`` in [0, 1]; summed over the classes.

    Raises:
        InputError: the shapes differ, an array is empty, or rows are not distributions.
    """
    p, q = _distributions(first, second)
    middle = (p + q) / 2
    nats = (special.rel_entr(p, middle) + special.rel_entr(q, middle)).sum(axis=1) / 2
    return np.asarray(np.clip(nats / math.log(2), 0.0, 1.0), dtype=np.float64)


def zero_retrain_forgetting(unlearned: ArrayLike, incompetent: ArrayLike) -> float:
    """ZRF ``= 1 - mean_x JS(p_u(x) || p_bad(x))`` on the forget set, in [0, 1] (Chundawat et al. 2023).

    1: the model answers like a randomly initialised network. Higher is NOT better without end: the target is the retrained
    model's value, and beyond it the forget set is treated in a way that shows. The divergence is in bits and summed over the
    classes; the published code takes the mean over classes too, so it is C times too small and its score always near 1.

    Args:
        unlearned: probabilities ``[examples, classes]`` of the model on the forget set.
        incompetent: of a randomly initialised network of the same architecture.

    Raises:
        InputError: the shapes differ, an array is empty, or rows are not distributions.
    """
    return 1 - float(jensen_shannon(unlearned, incompetent).mean())


def retrain_free_divergence(
    unlearned: ArrayLike, forget_labels: ArrayLike, original: ArrayLike, holdout_labels: ArrayLike
) -> float:
    """RF-JSD (LoTUS, Spartalis et al. 2025): a distance to retraining that needs no retrained model, in [0, 1]; lower is better.

    For each class of the forget set, the Jensen-Shannon divergence in bits between the mean probabilities that the unlearned
    model gives to its forget examples and those that the ORIGINAL model gives to held-out examples of the class; then the mean
    over classes. A retrained model is above 0 by what two samples and two seeds differ. Not for a forgotten class: held-out data
    of it are no model of not knowing it. NaN if a probability is.

    Args:
        unlearned: probabilities ``[forget examples, classes]`` of the unlearned model.
        forget_labels: ``[forget examples]``.
        original: probabilities ``[holdout examples, classes]`` of the original model.
        holdout_labels: ``[holdout examples]``.

    Raises:
        InputError: shapes differ, rows are not distributions, or a class of the forget set has no held-out example.
    """
    inside, outside = _checked(unlearned), _checked(original)
    mine, theirs = codes(forget_labels, "forget labels"), codes(holdout_labels, "holdout labels")
    same_length(unlearned=inside, labels=mine)
    same_length(original=outside, labels=theirs)
    missing = np.setdiff1d(mine, theirs)
    if len(missing):
        raise InputError(f"There is no held-out example of class {missing[0]}, which the forget set has.")
    means = [np.stack([p[y == c].mean(axis=0) for c in np.unique(mine)]) for p, y in ((inside, mine), (outside, theirs))]
    return float(jensen_shannon(means[0], means[1]).mean())


def relearn_steps(losses: ArrayLike, original: float, slack: float = 0.05) -> int | None:
    """Steps of relearning until the loss is back: the first t with ``l_t <= (1 + slack) l_original``.

    Args:
        losses: on the forget set before the first step and after each one ``[steps + 1]``; not negative.
        original: loss of the model before unlearning.
        slack: relative.

    Returns:
        The number of steps, 0 if it was never lost, None if it did not come back.

    Raises:
        InputError: there is no loss, or a loss is negative (a relative slack then means nothing).
    """
    curve = vector(losses, "losses")
    if (curve < 0).any() or original < 0 or slack < 0:
        raise InputError("Relearning is counted on losses that are not negative.")
    back = np.flatnonzero(curve <= (1 + slack) * original)
    return int(back[0]) if len(back) else None


def regain_steps(accuracies: ArrayLike, original: float, slack: float = 0.05) -> int | None:
    """:func:`relearn_steps` by accuracy, for classifiers: the first t with ``A_t >= (1 - slack) A_original``.

    Args:
        accuracies: on the forget set before the first step and after each one ``[steps + 1]``, [0, 1].
        original: accuracy of the model before unlearning, [0, 1].
        slack: relative, in [0, 1).

    Raises:
        InputError: there is no accuracy, or one is out of range.
    """
    curve = vector(accuracies, "accuracies")
    if (curve < 0).any() or (curve > 1).any() or not 0 <= slack < 1:
        raise InputError("Accuracies must be in [0, 1], and the slack in [0, 1).")
    back = np.flatnonzero(curve >= (1 - slack) * share(original, "accuracy before unlearning"))
    return int(back[0]) if len(back) else None


def relearn_ratio(unlearned: int | None, retrained: int | None) -> float:
    """AIN ``= steps(unlearned) / steps(retrained)``, in [0, inf); the target is 1 (anamnesis index, as in Tarun et al. 2023).

    Below 1 the knowledge is still inside, above 1 more was destroyed than retraining would have. Both counts must come from
    copies: a reference that is trained in place is further along at every call. NaN where either model never came back (None) or
    the retrained model needs no step.

    Raises:
        InputError: a count is negative.
    """
    if (unlearned or 0) < 0 or (retrained or 0) < 0:
        raise InputError("Steps of relearning cannot be negative.")
    if unlearned is None or not retrained:
        return math.nan
    return unlearned / retrained


def _distributions(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    p, q = _checked(first), _checked(second)
    if p.shape != q.shape:
        raise InputError(f"Two models must give the same classes for the same examples; got {p.shape} and {q.shape}.")
    return p, q


def _checked(values: ArrayLike) -> Floats:
    p = matrix(values, "probabilities")
    if finite(p) and ((p < 0).any() or (np.abs(p.sum(axis=1) - 1) > 1e-4).any()):
        raise InputError("Rows of probabilities must be non-negative and sum to 1.", "Pass softmax outputs, not logits.")
    return p
