"""What a report draws: ROC curves, loss distributions, and answers side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expunge.audit.document import Curve, Distribution, Sample, Series
from expunge.audit.evidence import Evidence
from expunge.audit.metrics.membership import Membership
from expunge.audit.metrics.rouge import lacks_questions
from expunge.audit.scores import Floats
from expunge.core.statistics import roc

CAP = 2000  #: values per histogram
POINTS = 200  #: points per line


def roc_curves(evidence: Evidence, metric: Membership, labels: Sequence[str]) -> list[Curve]:
    """One curve per attack with a line per model: members found against non-members accused."""
    if "holdout" not in evidence.sets:
        return []
    curves = []
    for attack in metric.chosen(evidence):
        series = []
        for label in labels:
            if attack.lacks(evidence, label):
                continue
            holdout, forget = metric.pair(evidence, attack, label)
            if len(holdout) and len(forget) and np.isfinite([*holdout, *forget]).all():
                fpr, tpr = thinned(*roc(holdout, forget))
                series.append(Series(label=label, x=fpr.tolist(), y=tpr.tolist()))
        if series:
            curves.append(
                Curve(
                    name=f"roc.{attack.name}", title=f"Membership attack {attack.title}", x_label="false positive rate",
                    y_label="true positive rate", series=series,
                )
            )  # fmt: skip
    return curves


def thinned(x: Floats, y: Floats, points: int = POINTS) -> tuple[Floats, Floats]:
    """A line with at most ``points`` of its points, evenly spread over them, first and last kept."""
    if len(x) <= points:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, points).round().astype(int))
    return x[kept], y[kept]


def loss_distribution(evidence: Evidence, label: str) -> Distribution:
    """Mean losses per answer by set; at most :data:`CAP` per set, drawn with the protocol's seed.

    Losses that are not finite cannot be drawn: they are left out, and the document says how many.
    """
    groups = {}
    for name in evidence.sets:
        if evidence.goal(name) == "utility":
            continue
        scores = evidence.scores(label, name)
        values = scores.nll()[scores.counts > 0]
        finite = values[np.isfinite(values)]
        if len(finite) < len(values):
            evidence.miss(f"{len(values) - len(finite)} losses of {label!r} on {name} are not finite and are not drawn.")
        if len(finite) > CAP:
            finite = np.random.default_rng(evidence.protocol.seed).choice(finite, CAP, replace=False)
        groups[name] = [float(v) for v in finite]
    return Distribution(quantity="loss", model=label, groups=groups)


def samples(evidence: Evidence, name: str, count: int, labels: Sequence[str]) -> list[Sample]:
    """Prompts of a set, of as many different clusters as there are, with the answer of each model."""
    if not count or name not in evidence.sets or lacks_questions(evidence, name):
        return []
    records = evidence.records(name)
    answers = {label: evidence.generations(label, name) for label in labels}
    return [
        Sample(
            id=records[i].id, set=name, prompt=records[i].prompt or _last_turn(records[i].messages), gold=records[i].answer,
            answers={label: made[i].text for label, made in answers.items()},
        )
        for i in spread(evidence.clusters(name), count)
    ]  # fmt: skip


def spread(clusters: Sequence[str], count: int) -> list[int]:
    """Indices of ``count`` items, one of each cluster before a second of any, in order.

    Clusters differ in which of their items is taken, so that not the same question is shown for every person.
    """
    members: dict[str, list[int]] = {}
    for i, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(i)
    rotated = [group[k % len(group) :] + group[: k % len(group)] for k, group in enumerate(members.values())]
    by_round = [group[turn] for turn in range(max(map(len, rotated), default=0)) for group in rotated if turn < len(group)]
    return sorted(by_round[:count])


def _last_turn(messages: Sequence[tuple[str, str]]) -> str:
    return messages[-1][1] if messages else ""
