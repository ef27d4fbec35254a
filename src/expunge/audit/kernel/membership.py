"""Membership attacks on one model: is the forget set still recognised as training data, from losses, confidences or outputs?

These look at one model and at populations, so they see averages only: on a set of memorised mislabelled rows they can report the
same for the untouched model as for a retrained one. :mod:`~expunge.audit.kernel.likelihood` attacks example by example and needs
many models. Every value here is read beside the retrained model's value for the same sets.

Scores are oriented HIGHER = LESS member-like, as losses and entropies are; of confidences and margins pass the negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.svm import SVC

from expunge.audit.kernel.arrays import Floats, finite, matrix, vector
from expunge.core.errors import InputError
from expunge.core.ranking import auc, roc, tpr_at_fpr


@dataclass(frozen=True)
class Separation:
    """How well a score tells members from non-members.

    Attributes:
        auc: area under the ROC curve, 1 = members fully recognised, 0.5 = not at all, below = they look stranger than unseen
            data.
        balanced_accuracy: of the best threshold, [0.5, 1]; the threshold is chosen on the same scores, so chance is a little
            above 0.5 (use :func:`best_threshold` on shadow data and :func:`threshold_accuracy` for an honest one).
        tpr_at_1_percent, tpr_at_01_percent: members caught while at most 1 % or 0.1 % of non-members is, [0, 1]; NaN with
            fewer than 100 or 1,000 non-members, of which no such share exists.
    """

    auc: float
    balanced_accuracy: float
    tpr_at_1_percent: float
    tpr_at_01_percent: float


def threshold_attack(nonmembers: ArrayLike, members: ArrayLike) -> Separation:
    """Every threshold on a score, such as the loss (Yeom et al. 2018), entropy or modified entropy (Song and Mittal 2021).

    With the forget set as members and unseen data of the same distribution as non-members, a model retrained without a random
    forget set has an AUC near 0.5. With a forgotten class it does not: the sets differ. NaN if a score is NaN or infinite.

    Args:
        nonmembers, members: scores ``[m]`` and ``[n]``, higher = less member-like.

    Raises:
        InputError: a sample is empty.
    """
    outside, inside = vector(nonmembers, "scores of non-members"), vector(members, "scores of members")
    if not finite(outside, inside):
        return Separation(math.nan, math.nan, math.nan, math.nan)
    fpr, tpr = roc(outside, inside)
    rates = []
    for allowed in (0.01, 0.001):
        caught, of = tpr_at_fpr(outside, inside, allowed)
        rates.append(caught / of if len(outside) * allowed >= 1 else math.nan)
    return Separation(auc(outside, inside), float((tpr - fpr).max() + 1) / 2, rates[0], rates[1])


def best_threshold(nonmembers: ArrayLike, members: ArrayLike) -> float:
    """The threshold t of "member if the score is below t" with the best balanced accuracy; halfway between two scores.

    NaN if a score is not finite; minus or plus infinity where calling nobody or everybody a member is best.

    Raises:
        InputError: a sample is empty.
    """
    outside, inside = vector(nonmembers, "scores of non-members"), vector(members, "scores of members")
    if not finite(outside, inside):
        return math.nan
    fpr, tpr = roc(outside, inside)
    best = int(np.argmax(tpr - fpr))
    cuts = np.concatenate([[-math.inf], np.unique(np.concatenate([outside, inside])), [math.inf]])
    return float((cuts[best] + cuts[best + 1]) / 2)


def threshold_accuracy(threshold: float, nonmembers: ArrayLike, members: ArrayLike) -> float:
    """Balanced accuracy of "member if the score is below the threshold", in [0, 1]; 0.5 is chance.

    The threshold comes from elsewhere: the mean training loss (Yeom et al. 2018) or :func:`best_threshold` on shadow data. NaN if
    a score or the threshold is NaN.

    Raises:
        InputError: a sample is empty.
    """
    outside, inside = vector(nonmembers, "scores of non-members"), vector(members, "scores of members")
    if math.isnan(threshold) or np.isnan(outside).any() or np.isnan(inside).any():
        return math.nan
    return float((inside < threshold).mean() + (outside >= threshold).mean()) / 2


def entropy_attack(retain: ArrayLike, test: ArrayLike, forget: ArrayLike) -> float:
    """Share of the forget set that a logistic regression on the prediction entropy calls member, in [0, 1].

    As in the code of Bad Teacher (Chundawat et al. 2023) and SSD (Foster et al. 2024): trained on the audited model with the
    retain set as members and test data as non-members, classes balanced by weight. The target is the retrained model's value,
    neither 0 nor 0.5: lower than that means that the forget set stands out by its uncertainty. NaN if a value is not finite or
    all training values are equal.

    Args:
        retain, test, forget: entropies of the audited model ``[examples]``, in any order.

    Raises:
        InputError: a set is empty.
    """
    inside, outside, queries = (
        vector(a, f"entropies of the {n} set") for a, n in zip((retain, test, forget), _NAMES, strict=True)
    )
    values, members = _training(inside, outside)
    if not finite(values, queries) or np.ptp(values) == 0:
        return math.nan
    model = LogisticRegression(class_weight="balanced").fit(values[:, None], members)
    return float(model.predict(queries[:, None]).mean())


def svc_efficacy(retain: ArrayLike, test: ArrayLike, forget: ArrayLike) -> float:
    """MIA-efficacy of the five metrics: share of the forget set that an SVM on the confidence calls NON-member, in [0, 1].

    Jia et al. 2023: an RBF machine (C = 3, gamma = 1) trained on the audited model itself, with the first |T| retain examples as
    members and the test set T as non-members. Higher is more forgotten; a retrained model is below 1, since it is sure of most
    forget examples without having seen them, and that value is the target. It says nothing about single examples, and on nearly
    saturated confidences it jumps between seeds: report several. Both sides are cut to equal length, in the order given, so fix
    that order; its cost grows with the square of it. NaN if a value is not finite or all training values are equal.

    Args:
        retain, test, forget: probabilities of the label ``[examples]``.

    Raises:
        InputError: a set is empty.
    """
    return 1 - svc_members(retain, test, forget)


def svc_members(retain: ArrayLike, test: ArrayLike, forget: ArrayLike) -> float:
    """Share of ``forget`` that the machine of :func:`svc_efficacy` calls member, on any score, in [0, 1] or NaN.

    Raises:
        InputError: a set is empty.
    """
    inside, outside, queries = (vector(a, f"scores of the {n} set") for a, n in zip((retain, test, forget), _NAMES, strict=True))
    size = min(len(inside), len(outside))
    values, members = _training(inside[:size], outside[:size])
    if not finite(values, queries) or np.ptp(values) == 0:
        return math.nan
    model = SVC(C=3.0, kernel="rbf", gamma="auto").fit(values[:, None], members)
    return float(model.predict(queries[:, None]).mean())


def logistic_attack(unseen: ArrayLike, forget: ArrayLike, *, splits: int = 10, seed: int = 0) -> float:
    """Mean accuracy of a logistic regression on the loss, forget set against unseen data, in [0, 1].

    The attack of the starting kit of the NeurIPS 2023 competition and of MUFAC's NoMUS: stratified shuffle splits, a tenth held
    out in each. The larger set is subsampled to the size of the smaller, so that 0.5 is chance; a retrained model is near 0.5 for
    a random forget set, and above it where the sets differ in distribution. Much below 0.5 cannot be read as over-forgetting: the
    regression learns either direction. NaN if a loss is not finite or all are equal.

    Args:
        unseen: losses of data that was never trained on ``[m]``.
        forget: losses of the forget set ``[n]``.
        splits: number of random splits.
        seed: of subsampling and splits.

    Raises:
        InputError: a set has fewer than 10 examples.
    """
    outside, inside = vector(unseen, "losses of unseen data"), vector(forget, "losses of the forget set")
    size = min(len(outside), len(inside))
    if size < _FEWEST:
        raise InputError(
            f"This attack holds out a tenth: each set needs {_FEWEST} examples; got {len(inside)} and {len(outside)}."
        )
    rng = np.random.default_rng(seed)
    inside, outside = (a if len(a) == size else rng.choice(a, size, replace=False) for a in (inside, outside))
    values, members = _training(inside, outside)
    if not finite(values) or np.ptp(values) == 0:
        return math.nan
    folds = StratifiedShuffleSplit(n_splits=splits, random_state=seed)
    return float(cross_val_score(LogisticRegression(), values[:, None], members, cv=folds, scoring="accuracy").mean())


def sorted_softmax_attack(retain: ArrayLike, test: ArrayLike, forget: ArrayLike, *, seed: int = 0) -> float:
    """ASR of LAF (Shen et al. 2024): balanced accuracy of boosted trees on SORTED probabilities, in [0, 1].

    Trained on the audited model to tell retain examples (member) from a random half of the test data (non-member), equally many
    of both and at most as many as the forget set has; evaluated with the forget set as members and the other half of the test
    data as non-members. Sorting hides the label. The best value is the retrained model's, about 0.5 for a random forget set.

    The published code uses XGBoost with 100 trees. Here it is scikit-learn's histogram gradient boosting with the same number of
    trees, learning rate 0.3, depth 6, L2 penalty 1 and four examples in a leaf (XGBoost asks for a Hessian sum of 1, four
    examples at even odds). The published accuracy is over unequally large sets; the mean of both rates taken here has chance at
    0.5. NaN if a probability is not finite.

    Args:
        retain, test, forget: predicted probabilities ``[examples, classes]``.
        seed: of the samples and the trees.

    Raises:
        InputError: a set is empty, the classes differ, or there are fewer than two test examples.
    """
    inside, outside, queries = (
        matrix(a, f"probabilities of the {n} set") for a, n in zip((retain, test, forget), _NAMES, strict=True)
    )
    if not inside.shape[1] == outside.shape[1] == queries.shape[1]:
        raise InputError("The retain, test and forget sets must have the same classes.")
    if len(outside) < 2:
        raise InputError("Half of the test data trains the attack and half judges it: it needs two examples or more.")
    if not finite(inside, outside, queries):
        return math.nan
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(outside))
    train, judge = outside[shuffled[: len(outside) // 2]], outside[shuffled[len(outside) // 2 :]]
    size = min(len(inside), len(train), len(queries))
    sample = inside[rng.choice(len(inside), size, replace=False)]
    features = -np.sort(-np.concatenate([sample, train[:size]]), axis=1)
    model = HistGradientBoostingClassifier(
        max_iter=100, learning_rate=0.3, max_depth=6, max_leaf_nodes=None, min_samples_leaf=4, l2_regularization=1.0,
        early_stopping=False, random_state=seed,
    )  # fmt: skip
    model.fit(features, np.repeat([1, 0], size))
    caught = model.predict(-np.sort(-queries, axis=1)).mean()
    wrong = model.predict(-np.sort(-judge, axis=1)).mean()
    return float(caught + 1 - wrong) / 2


_NAMES = ("retain", "test", "forget")
_FEWEST = 10


def _training(members: Floats, nonmembers: Floats) -> tuple[Floats, Floats]:
    values = np.concatenate([members, nonmembers])
    return values, np.repeat([1.0, 0.0], [len(members), len(nonmembers)])
