"""From shared evidence to a verdict: attacks on copies of the models, cached like scores, and what the verdict reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from expunge.audit.arrays import Attempt
from expunge.audit.attacks.membership import MEMBERSHIP
from expunge.audit.attacks.quantise import quantised
from expunge.audit.attacks.readout import read_out
from expunge.audit.attacks.registry import Attack
from expunge.audit.attacks.relearn import RelearnPoint, RelearnSettings, packed, recovered, relearn, split, unpacked
from expunge.audit.document import Curve, Series
from expunge.audit.evidence import Evidence
from expunge.audit.metrics.accuracy import Accuracy, Skill
from expunge.audit.metrics.distances import LooksSeen
from expunge.audit.metrics.fluency import degenerate
from expunge.audit.metrics.memorisation import ExtractionStrength
from expunge.audit.metrics.probability import OptionProbability, Probability
from expunge.audit.metrics.refused import Refused
from expunge.audit.metrics.registry import Need, RecordMetric
from expunge.audit.metrics.rouge import RougeRecall, lacks_questions
from expunge.audit.metrics.truth_ratio import TruthRatio
from expunge.audit.protocol import judged
from expunge.audit.scores import Floats, score
from expunge.audit.settings import AuditSettings
from expunge.audit.store import compute_signature, examples_digest
from expunge.audit.telling import told
from expunge.audit.verdict import Arrays, Sample, judge
from expunge.core.access import Level, Offer
from expunge.core.results import Direction, Judgement, Number
from expunge.core.statistics import bootstrap

#: Attacks whose scores a verdict compares: those that need nothing but the model itself and score every record.
COMPARED = ("loss", "min-k", "min-k-plus-plus", "zlib", "lira")


@dataclass
class Attacked:
    """What the attacks found, by model, the step size of relearning, which is the same for all, and further attacks to run."""

    relearn: dict[str, list[RelearnPoint]] = field(default_factory=dict)
    quantised: dict[str, dict[int, Floats]] = field(default_factory=dict)
    rates: tuple[float, ...] | None = None
    read_out: dict[str, Sample] = field(default_factory=dict)
    tried: Sequence[Attack] = ()


def attack_copy(evidence: Evidence, label: str, settings: AuditSettings, attacked: Attacked) -> None:
    """Relearning and rounding of weights on copies of one model, or their results from the cache, added to ``attacked``.

    The step sizes of relearning follow from the first model attacked, which must be the target where there is one.
    """
    if evidence.subject(label).role == "base":
        return
    budget = settings.relearn
    if budget is not None and len(evidence.records("forget")) < 2:
        evidence.miss("Relearning was not tried: it needs two forget records, one to train on and one to measure.")
    elif budget is not None:
        if attacked.rates is None:
            attacked.rates = budget.resolved(evidence.adapter(label)).rates
        fixed = budget.model_copy(update={"rates": attacked.rates})
        attacked.relearn[label] = _relearn(evidence, label, fixed, settings.seed)
    if settings.read_out and {Offer.ROWS, Offer.LOGITS, Offer.FEATURES} <= evidence.offers and "retain" in evidence.sets:
        attacked.read_out[label] = _read_out(evidence, label, settings.seed)
    attacked.quantised[label] = {b: _quantised(evidence, label, b, settings.quantise_group) for b in settings.quantise}


def judge_models(
    evidence: Evidence, attacked: Attacked, settings: AuditSettings, needs: set[Need], utilities: Mapping[str, float | None]
) -> dict[str, Judgement]:
    """A judgement of every model but base ones; retrained models are judged against the other retrained ones.

    Args:
        evidence: of all models.
        attacked: what attacks on copies found.
        settings: with the thresholds.
        needs: what the chosen metrics read: generations are judged where they were made for a metric.
        utilities: model utility by label.
    """
    labels = [s.label for s in evidence.subjects.values() if s.role != "base"]
    target = next(iter(evidence.labels("target")), None)
    gold = evidence.labels("retrained")
    if len(evidence.records("forget")) < 2:
        evidence.miss("No verdict was reached: it needs at least two forget records.")
        return {}
    if target is None and gold:
        evidence.miss("No verdict was reached: it needs the target model, from which the retrained models must stand apart.")
        return {}
    arrays = {n: model_arrays(evidence, n, attacked, Need.GENERATION in needs, utilities.get(n)) for n in labels}
    out = {}
    for label in labels:
        others = [arrays[g] for g in evidence.labels("retrained", but=label)]
        asked = settings.protocol
        against = arrays[target or label]
        found = judge(arrays[label], others, against, settings.thresholds, protocol=asked, access=evidence.access)
        out[label] = found if asked is None else judged(asked, found, len(gold), settings.protocol_label())
    return out


def model_arrays(evidence: Evidence, label: str, attacked: Attacked, generated: bool, model_utility: float | None) -> Arrays:
    """The per-example measurements of one model that a verdict compares.

    Of a classifier losses count up to that of a guess among its classes: a class that is no likelier than a guess is not known,
    and how much less likely it is says more of the length of training than of knowledge. Without this a class that a retrained
    model finds e^-10 likely and another model e^-4 would seem to be known. Where guards stand before a model the same holds of
    tokens and the vocabulary: a refusal is scored as a guess, and what is less likely than one is not known either.
    """
    if evidence.access is Level.TEXT:
        return _in_words(evidence, label, attacked)
    records = evidence.records("forget")
    ratio = TruthRatio()
    membership = {}
    if "holdout" in evidence.sets and not evidence.asked:
        for attack in (MEMBERSHIP.get(name)() for name in COMPARED):
            if not attack.offers <= evidence.offers or attack.lacks(evidence, label):
                continue
            forget, unseen = (attack.values(evidence, label, name).values for name in ("forget", "holdout"))
            membership[attack.name] = (forget, unseen)
    return Arrays(
        label=label,
        ids=[r.id for r in records],
        clusters=evidence.clusters("forget"),
        nll=np.minimum(evidence.scores(label, "forget").nll(), evidence.ceiling),
        log_truth_ratio=None if ratio.lacks(evidence, "forget") else ratio.log_ratios(evidence, label, "forget").values,
        extraction=_values(ExtractionStrength(), evidence, label),
        looks_seen=_looks_seen(evidence, label),
        membership=membership,
        holdout_clusters=evidence.clusters("holdout") if membership else (),
        utility=_utilities(evidence, label, generated),
        model_utility=model_utility,
        degenerate=_degenerate(evidence, label) if generated else {},
        relearn=[_capped(p, evidence.ceiling) for p in attacked.relearn.get(label, ())],
        attempts={a.name: _attempt(a, evidence, label) for a in attacked.tried if not a.lacks(evidence, "forget")},
        read_out=_capped_sample(attacked.read_out.get(label), evidence.ceiling),
        quantised={b: np.minimum(v, evidence.ceiling) for b, v in attacked.quantised.get(label, {}).items()},
    )


def _in_words(evidence: Evidence, label: str, attacked: Attacked) -> Arrays:
    """The same of answers in words, and of nothing else."""
    found = told(evidence, label, "forget")
    return Arrays(
        label=label,
        ids=[r.id for r in evidence.records("forget")],
        clusters=evidence.clusters("forget"),
        told=np.where(found.present, found.values, np.nan),
        refused=Refused().values(evidence, label, "forget").values if evidence.asked else np.zeros(len(found.values)),
        utility=_utilities(evidence, label, generated=True),
        degenerate=_degenerate(evidence, label),
        attempts={a.name: _attempt(a, evidence, label) for a in attacked.tried if not a.lacks(evidence, "forget")},
    )


def _capped_sample(sample: Sample | None, ceiling: float) -> Sample | None:
    return None if sample is None else Sample(np.minimum(sample.values, ceiling), sample.clusters)


def _capped(point: RelearnPoint, ceiling: float) -> RelearnPoint:
    return replace(
        point, losses_trained=np.minimum(point.losses_trained, ceiling), losses_heldout=np.minimum(point.losses_heldout, ceiling)
    )


def _values(metric: RecordMetric, evidence: Evidence, label: str) -> Floats | None:
    """Values on the forget set, where the modality and the data allow the metric."""
    if not metric.offers <= evidence.offers or metric.lacks(evidence, "forget"):
        return None
    return metric.values(evidence, label, "forget").values


def _attempt(attack: Attack, evidence: Evidence, label: str) -> Attempt:
    found = attack.values(evidence, label, "forget")
    return Attempt(
        attack.title, np.where(found.present, found.values, np.nan), attack.toward, str(attack.criterion), attack.convicts,
        attack.applies(evidence, label), attack.certain(evidence, label),
    )  # fmt: skip


def _looks_seen(evidence: Evidence, label: str) -> Floats | None:
    """How much each forget row looks trained on; 0 where its class is no likelier than a guess."""
    found = _values(LooksSeen(), evidence, label)
    return None if found is None else np.where(evidence.scores(label, "forget").nll() < evidence.ceiling, found, 0.0)


def attack_numbers(evidence: Evidence, attacked: Attacked, label: str) -> dict[str, Number]:
    """``relearn.recovered``, the recovered share at the last step, and ``quantised.<bits>-bit.loss`` on the forget set."""
    out = {}
    at = evidence.protocol
    clusters = evidence.clusters("forget")
    for bits, losses in attacked.quantised.get(label, {}).items():
        found = bootstrap(losses, clusters, draws=at.draws, level=at.level, seed=at.seed)
        note = f"mean loss of the forget answers with weights rounded to {bits} bits"
        out[f"quantised.{bits}-bit.loss"] = found.number(Direction.REFERENCE, (0.0, None), note)
    if label in attacked.read_out:
        held = attacked.read_out[label]
        found = bootstrap(held.values, held.clusters, draws=at.draws, level=at.level, seed=at.seed)
        note = "mean loss of one half of the forget rows under a last layer fitted on the model's features, other half included"
        out["read-out.loss"] = found.number(Direction.REFERENCE, (0.0, None), note)
    target = next(iter(evidence.labels("target")), None)
    others = [attacked.relearn[o] for o in evidence.labels("retrained", but=label) if o in attacked.relearn]
    if label not in attacked.relearn or target is None or not others:
        return out
    full = dict(zip((r.id for r in evidence.records("forget")), evidence.scores(target, "forget").nll().tolist(), strict=True))
    last = recovered(attacked.relearn[label], others, full, draws=at.draws, level=at.level, seed=at.seed)[-1]
    note = (
        f"after {last.step} steps on one half of the forget set, on the other half: 0 = as retrained models under the same "
        "attack, 1 = as the target knew it"
    )
    return out | {"relearn.recovered": last.share.number(Direction.ZERO, (None, None), note)}


def relearn_curve(evidence: Evidence, attacked: Attacked, labels: Sequence[str]) -> list[Curve]:
    """Mean loss on the half of the forget set that was not trained on, by steps of relearning on the other half."""
    at = evidence.protocol
    series = []
    for label in labels:
        points = attacked.relearn.get(label, [])
        found = [
            bootstrap(p.losses_heldout, p.clusters_heldout, draws=at.draws, level=at.level, seed=at.seed)
            for p in points
            if np.isfinite(p.losses_heldout).all()
        ]
        if not points or len(found) < len(points):
            continue
        line = Series(label=label, x=[float(p.step) for p in points], y=[f.value for f in found])
        lows, highs = [f.low for f in found], [f.high for f in found]
        if all(v is not None for v in (*lows, *highs)):
            line = line.model_copy(update={"low": lows, "high": highs})
        series.append(line)
    if not series:
        return []
    title = "Relearning: loss on the half of the forget set that was not trained on"
    unit = " (nats per token)" if Offer.TEXT in evidence.offers else " (nats)" if Offer.LOGITS in evidence.offers else ""
    return [Curve(name="relearn", title=title, x_label="optimiser steps", y_label=f"mean loss{unit}", series=series)]


def _utilities(evidence: Evidence, label: str, generated: bool) -> dict[str, Sample]:
    out = {}
    for name in evidence.sets:
        goal = evidence.goal(name)
        if goal not in ("retain", "utility"):
            continue
        for metric in _useful(evidence, name, goal, generated):
            found = metric.values(evidence, label, name)
            clusters = [c for c, p in zip(evidence.clusters(name), found.present, strict=True) if p]
            if clusters:
                out[f"{name}.{metric.name}"] = Sample(found.values[found.present], clusters)
    return out


def _useful(evidence: Evidence, name: str, goal: str, generated: bool) -> list[RecordMetric]:
    """What tells how useful a model is on a set."""
    if Offer.ROWS in evidence.offers:
        rows: RecordMetric = Accuracy() if Offer.LOGITS in evidence.offers else Skill()
        return [] if rows.lacks(evidence, name) else [rows]
    options, rouge = OptionProbability(), RougeRecall()
    if evidence.access is Level.TEXT:
        return [] if rouge.lacks(evidence, name) else [rouge]
    first: RecordMetric = options if goal == "utility" and not options.lacks(evidence, name) else Probability()
    return [first, rouge] if generated and not rouge.lacks(evidence, name) else [first]


def _degenerate(evidence: Evidence, label: str) -> dict[str, Sample]:
    out = {}
    for name in evidence.sets:
        if name != "holdout" and not lacks_questions(evidence, name):
            texts = [g.text for g in evidence.generations(label, name)]
            out[name] = Sample(np.array([float(degenerate(t)) for t in texts]), evidence.clusters(name))
    return out


def _relearn(evidence: Evidence, label: str, budget: RelearnSettings, seed: int) -> list[RelearnPoint]:
    adapter, subject = evidence.adapter(label), evidence.subject(label)
    forget = [adapter.encode(r) for r in evidence.records("forget")]
    benign = budget.material == "retain" and "retain" in evidence.sets
    retain = [adapter.encode(r) for r in evidence.records("retain")] if benign else None
    key = ""
    if evidence.store is not None:
        content = "+".join(examples_digest(adapter, e) for e in (forget, retain or []) if e)
        options = {**budget.model_dump(mode="json"), "seed": seed}
        signature = compute_signature(adapter, budget.max_tokens)
        key = evidence.store.key("relearn", subject.fingerprint, signature, content, **options)
        held = evidence.store.load_arrays(key)
        if held is not None:
            return unpacked(held)
    if evidence.progress is not None:
        evidence.progress(f"{label}: relearning on a copy", 0, 1)
    points = relearn(adapter, forget, retain, budget, seed)
    if evidence.progress is not None:
        evidence.progress(f"{label}: relearning on a copy", 1, 1)
    if evidence.store is not None:
        evidence.store.save_arrays(key, packed(points))
    return points


def _read_out(evidence: Evidence, label: str, seed: int) -> Sample:
    """Loss of one half of the forget rows under a last layer fitted on the retain rows and the other half."""
    forget, retain = evidence.outputs(label, "forget"), evidence.outputs(label, "retain")
    adapter = evidence.adapter(label)
    trained, measured = split([adapter.encode(r) for r in evidence.records("forget")], seed)
    names = evidence.clusters("forget")
    losses = read_out(forget, retain, np.array(trained), np.array(measured), classes=forget.scores.shape[1], seed=seed)
    return Sample(losses, [names[i] for i in measured])


def _quantised(evidence: Evidence, label: str, bits: int, group: int | None) -> Floats:
    adapter, subject, at = evidence.adapter(label), evidence.subject(label), evidence.protocol
    examples = [adapter.encode(r) for r in evidence.records("forget")]
    key = ""
    if evidence.store is not None:
        content, signature = examples_digest(adapter, examples), compute_signature(adapter, at.batch_tokens)
        key = evidence.store.key("quantised", subject.fingerprint, signature, content, bits=bits, group=group)
        held = evidence.store.load_arrays(key)
        if held is not None:
            return held["nll"].astype(np.float64)
    copy = quantised(adapter, bits, group)
    found = score(
        copy, examples, batch_tokens=at.batch_tokens, progress=evidence.progress, what=f"{label}: scoring with {bits}-bit weights"
    )
    losses = found.nll()
    if evidence.store is not None:
        evidence.store.save_arrays(key, {"nll": losses})
    return losses
