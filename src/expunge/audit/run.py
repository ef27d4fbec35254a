"""The audit: several models on the same sets, one document."""

from __future__ import annotations

import datetime
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.adapters.base import Adapter
from expunge.adapters.head import base
from expunge.audit.attacks.registry import Attack, Criterion
from expunge.audit.document import AuditDocument, ModelEntry, Role
from expunge.audit.evidence import Evidence, Subject, need_sets
from expunge.audit.general import NAME as GENERAL
from expunge.audit.general import general_questions
from expunge.audit.judging import Attacked, attack_copy, attack_numbers, judge_models, relearn_curve
from expunge.audit.metrics.membership import Membership
from expunge.audit.metrics.registry import Metric, Need
from expunge.audit.metrics.rouge import lacks_questions
from expunge.audit.outputs import References
from expunge.audit.pictures import loss_distribution, roc_curves, samples
from expunge.audit.probes import Kind, take_clusters
from expunge.audit.scores import Progress
from expunge.audit.settings import AuditSettings
from expunge.audit.store import ScoreStore, compute_signature
from expunge.audit.telling import told
from expunge.core.access import OF_SCORES, Level, Offer
from expunge.core.errors import InputError
from expunge.core.results import Number
from expunge.data.records import RecordSet

_ORDER: dict[Role, int] = {"base": 0, "target": 1, "retrained": 2, "unlearned": 3}
_COMPARABLE = ("precision", "device", "attention", "torch", "schema")

ALWAYS_NOT_SHOWN = (
    "Intervals are over examples (whole clusters resampled): they say nothing about other training seeds of the same method.",
)
#: What is said where no attack of a kind was run on a language model.
NOT_RUN = {
    Criterion.PROMPTS: "Prompt attacks (jailbreaks, role play, other languages, solved questions of the subject) were not run.",
    Criterion.DECODING: "Only greedy answers were read: what sampling many times would bring up was not measured.",
    Criterion.REPRESENTATION: "Hidden states were not probed: knowledge that no answer shows would not be seen.",
}
NOT_SHOWN_TEXT = ("Degenerate text is told by repetition and emptiness; word salad without repetition is not recognised.",)


ASKED = (
    "A model here can only be asked: something stands before its weights, or it is only served. What is hidden so is not removed."
)
_READ = {
    Level.SCORES: "This audit has the access of somebody who gets answers and log-probabilities: nothing acted on weights or "
    "looked inside, of no model. Nothing can be called forgotten so. A refusal counts as a guess among the vocabulary; where a "
    "model stands that refuses, losses of all count up to that of such a guess.",
    Level.TEXT: "This audit has the access of somebody who gets answers in words: no log-probability was read, nothing acted on "
    "weights or looked inside, of no model. Likelihoods, truth ratios, extraction strength and membership were not measured, and "
    "nothing can be called forgotten so.",
}
_LESS = (Level.WEIGHTS, Level.SCORES, Level.TEXT)


@dataclass(frozen=True)
class AuditedModel:
    """A model to be audited.

    Attributes:
        label: unique name in the document ("target", "npo", "retrained seed 1").
        role: target, unlearned, retrained, or base (before any fine-tuning).
        adapter: holds the model, or a function that loads it: then only one such model is in memory at a time.
        path: where it came from, for the reader.
        method: name of the method that made it.
        seed: its training seed.
        cost: what making it cost: seconds, peak_bytes, steps, tokens.
        settings: recipe and options that made it.
        stopped: why training ended, in one sentence.
        asked: whether it can only be asked, since its weights are those of another model and something stands before them: then
            no attack acts on weights or looks inside, of no model.
    """

    label: str
    role: Role
    adapter: Adapter | Callable[[], Adapter]
    path: str = ""
    method: str = ""
    seed: int | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    stopped: str = ""
    asked: bool = False


def audit(
    models: Sequence[AuditedModel],
    sets: Mapping[str, RecordSet[Any]],
    settings: AuditSettings | None = None,
    *,
    references: References | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    title: str = "Audit",
) -> AuditDocument:
    """Measure, attack and judge models on one request; writes nothing but the cache.

    Every example is scored once per model and every prompt continued once, however many metrics read them; what the cache
    has under the same contents is not computed again, so target and retrained models are scored once for all methods.

    Args:
        models: with unique labels. Without a retrained model nothing can be called forgotten.
        sets: ``forget`` (needed), ``retain``, ``holdout`` (never trained on), and further named utility sets.
        settings: what is measured; none: everything.
        references: margins of the rows under many further models; the strongest evidence on single rows reads them.
        cache: folder of the scores; none keeps them in memory.
        progress: told what is being done, how far, of how much.
        title: of the document.

    Raises:
        InputError: no forget set, an empty set, labels that are not unique, a text that does not fit into a model's context,
            an access that the models do not offer, or models of different precision, device or attention kernel (their scores are
            not comparable).
    """
    started = time.perf_counter()
    settings = settings or AuditSettings()
    _check(models, sets)
    given = settings
    settings = settings.within(access_of(models, settings.access))
    used = {name: limited(records, settings) for name, records in sets.items()}
    store = ScoreStore(cache) if cache is not None else None
    _check_references(references, used)
    evidence = Evidence({}, used, settings.evidence_protocol(), store, progress, references)
    evidence.asked = any(m.asked or (isinstance(m.adapter, Adapter) and m.adapter.fronted) for m in models)
    ordered = sorted(models, key=lambda m: _ORDER[m.role])
    _register(evidence, ordered[0], settings)
    first = evidence.adapter(ordered[0].label)
    evidence.of_modality(first)
    _limit(evidence, models, given, settings)
    if evidence.asked and evidence.access is not Level.TEXT:
        evidence.ceiling = math.log(int(base(first.model).config.vocab_size))  # type: ignore[union-attr, arg-type]
    attacks = settings.chosen_attacks(evidence.offers)
    modality, metrics = first.modality, [*settings.chosen(evidence.offers), *attacks]
    del first
    attacked = Attacked(tried=attacks)
    signature = _gather(evidence, ordered, metrics, settings, attacked)
    entries = {m.label: _entry(evidence, m, metrics, attacked) for m in ordered}
    utilities = {label: e.numbers["model-utility"].value for label, e in entries.items() if "model-utility" in e.numbers}
    judgements = judge_models(evidence, attacked, settings, {n for m in metrics for n in m.needs}, utilities)
    labels = [m.label for m in models]
    asked = {"forget": settings.samples_forget, "retain": settings.samples_retain}
    shown = [s for name, count in asked.items() for s in samples(evidence, name, count, labels)]
    membership = [m for m in metrics if isinstance(m, Membership)]
    curves = relearn_curve(evidence, attacked, labels) + [c for m in membership for c in roc_curves(evidence, m, labels)]
    distributions = [] if evidence.access is Level.TEXT else [loss_distribution(evidence, label) for label in labels]
    return AuditDocument(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        title=title,
        modality=modality,
        data={
            **{name: _describe(sets[name], used[name]) for name in sets},
            **{
                name: {**_describe(records, records), "aside": "only refusals are counted"}
                for name, records in evidence.aside.items()
            },
        },
        models=[entries[n].model_copy(update={"judgement": judgements.get(n)}) for n in labels],
        curves=curves,
        distributions=distributions,
        samples=shown,
        not_shown=[*evidence.missing, *_general(models, used, settings), *ALWAYS_NOT_SHOWN, *_not_shown(evidence, attacks)],
        protocol=_protocol(settings, _tried(evidence, metrics, labels)),
        signature=signature,
        cost={"seconds": time.perf_counter() - started},
    )


def access_of(models: Sequence[AuditedModel], wanted: Level | None = None) -> Level:
    """What is had of the models: what was asked for, or as much as all of them offer.

    Raises:
        InputError: more was asked for than one of them offers.
    """
    most, least = Level.WEIGHTS, ""
    for model in models:
        own = Level.SCORES if model.asked else Level.WEIGHTS
        if isinstance(model.adapter, Adapter) and Offer.TEXT in model.adapter.offers and not model.adapter.offers >= OF_SCORES:
            own = Level.TEXT
        if _LESS.index(own) > _LESS.index(most):
            most, least = own, model.label
    if wanted is not None and _LESS.index(wanted) < _LESS.index(most):
        raise InputError(
            f"The model {least!r} gives no access to {wanted}: it can only be asked.", f"Leave the access out, or choose {most}."
        )
    return wanted or most


def _limit(evidence: Evidence, models: Sequence[AuditedModel], given: AuditSettings, settings: AuditSettings) -> None:
    """Let the evidence be what the access allows, and say what is not measured so.

    Raises:
        InputError: the models give no answers in words.
    """
    access = settings.access or Level.WEIGHTS
    if evidence.asked:
        evidence.miss(ASKED)
        if GENERAL not in evidence.sets:
            evidence.aside = {GENERAL: general_questions()}
    if access is Level.WEIGHTS:
        return
    if Offer.TEXT not in evidence.offers:
        raise InputError(
            f"An access to {access} is for models that answer in words, which these do not.", "Leave the access out."
        )
    for model in models:
        if isinstance(model.adapter, Adapter):
            evidence.offers &= model.adapter.offers
    evidence.offers, evidence.access = access.of(evidence.offers), access
    evidence.miss(_READ[access])
    left = [n for n in given.attacks if n != "all" and n not in settings.attacks]
    if left:
        evidence.miss(f"Not tried, since it takes more than this access: {', '.join(left)}.")


def limited(records: RecordSet[Any], settings: AuditSettings) -> RecordSet[Any]:
    """A set within the budget: whole clusters, drawn with the seed."""
    if settings.budget is None or len(records) <= settings.budget:
        return records
    chosen = take_clusters(records.clusters(), settings.budget, settings.seed)
    return RecordSet(records.name, tuple(records[int(i)] for i in chosen), records.source)


def _check(models: Sequence[AuditedModel], sets: Mapping[str, RecordSet[Any]]) -> None:
    need_sets(sets)
    if not models:
        raise InputError("There is no model to audit.")
    seen: set[str] = set()
    for model in models:
        if model.label in seen:
            raise InputError(f"Two audited models are called {model.label!r}.", "Give each its own label.")
        seen.add(model.label)


def _check_references(references: References | None, sets: Mapping[str, RecordSet[Any]]) -> None:
    for held in () if references is None else references.populations:
        for name, records in sets.items():
            if name not in held or held[name].shape[1] != len(records):
                raise InputError(
                    f"The reference models were not measured on the {len(records)} rows of the set {name!r}.",
                    "Measure them on the very sets that are audited, within the same budget.",
                )


def _gather(
    evidence: Evidence, models: Sequence[AuditedModel], metrics: Sequence[Metric], settings: AuditSettings, attacked: Attacked
) -> dict[str, str]:
    """Visit each model once: fingerprint, scores of everything that a metric reads, generations, attacks on copies."""
    signature: dict[str, str] = {}
    for model in models:
        found = _register(evidence, model, settings)
        _comparable(evidence, signature or found, found, model.label)
        signature = signature or found
        visit(evidence, model.label, metrics)
        attack_copy(evidence, model.label, settings, attacked)
    return signature


def _register(evidence: Evidence, model: AuditedModel, settings: AuditSettings) -> dict[str, str]:
    """Make a model known by its content hash; no reference to its adapter may stay, or two models would be in memory."""
    evidence.subjects[model.label] = Subject(model.label, model.role, "", model.adapter)
    adapter = evidence.adapter(model.label)
    evidence.subjects[model.label] = Subject(model.label, model.role, adapter.fingerprint(), model.adapter)
    return compute_signature(adapter, settings.batch_tokens)


def _comparable(evidence: Evidence, first: Mapping[str, str], other: Mapping[str, str], label: str) -> None:
    for key in _COMPARABLE:
        if first[key] != other[key] and evidence.access is Level.TEXT:
            evidence.miss(
                f"The model {label!r} was not computed as the models before it ({key}): where two words are nearly as likely it "
                "may choose the other one."
            )
            return
        if first[key] != other[key]:
            raise InputError(
                f"The model {label!r} is computed with {key} {other[key]}, the models before it with {first[key]}.",
                "Load all models of an audit alike: their scores are compared to the last digits.",
            )


def visit(evidence: Evidence, label: str, metrics: Sequence[Metric]) -> None:
    """Gather all that ``metrics`` read of a model, in one pass over each set."""
    needs = {n for m in metrics for n in m.needs}
    kinds: dict[Need, Kind] = {Need.PARAPHRASE: "paraphrase", Need.PERTURBED: "perturbed"}
    words = evidence.access is Level.TEXT
    for name in evidence.sets:
        if not words:
            evidence.scores(label, name)
        for need, kind in kinds.items():
            if not words and need in needs and evidence.has(name, kind):
                evidence.scores(label, name, kind)
        if (words or Need.GENERATION in needs) and name != "holdout" and not lacks_questions(evidence, name):
            evidence.generations(label, name)
    if words and evidence.subject(label).role != "base":
        told(evidence, label, "forget")
    for metric in metrics:
        metric.visit(evidence, label)


def _entry(evidence: Evidence, model: AuditedModel, metrics: Sequence[Metric], attacked: Attacked) -> ModelEntry:
    numbers: dict[str, Number] = {}
    for metric in metrics:
        numbers |= metric.compute(evidence, model.label)
    numbers |= attack_numbers(evidence, attacked, model.label)
    return ModelEntry(
        guarded=model.asked,
        label=model.label, role=model.role, fingerprint=evidence.subject(model.label).fingerprint, path=model.path,
        method=model.method, seed=model.seed, numbers=numbers, cost=dict(model.cost), stopped=model.stopped,
        settings=dict(model.settings),
    )  # fmt: skip


def _describe(given: RecordSet[Any], used: RecordSet[Any]) -> dict[str, Any]:
    return {
        "name": given.name,
        "source": given.source,
        "records": len(used),
        "of": len(given),
        "clusters": len(set(used.clusters())),
        "digest": given.digest,
    }


def _protocol(settings: AuditSettings, metrics: Sequence[Metric]) -> dict[str, Any]:
    return {
        **settings.model_dump(mode="json", exclude={"metrics", "options", "attacks", "attack_options"}),
        "metrics": {m.name: {**_said(m), "formula": m.formula, **m.model_dump(mode="json")} for m in metrics},
    }


def _tried(evidence: Evidence, metrics: Sequence[Metric], labels: Sequence[str]) -> list[Metric]:
    """Without the attacks that no model allows."""
    return [m for m in metrics if not isinstance(m, Attack) or any(m.applies(evidence, label) for label in labels)]


def _said(metric: Metric) -> dict[str, str]:
    """What a report says of an attack; metrics have their entries in the report's own glossary."""
    if not isinstance(metric, Attack):
        return {}
    first = inspect.cleandoc(type(metric).__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return {"title": metric.title, "text": first, "access": str(metric.access), "criterion": str(metric.criterion)}


def _not_shown(evidence: Evidence, attacks: Sequence[Attack]) -> tuple[str, ...]:
    """What no audit of the modality shows, and what reference models would."""
    if Offer.TEXT in evidence.offers:
        run = {a.criterion for a in attacks if not a.usual}
        return (*(text for kind, text in NOT_RUN.items() if kind not in run), *NOT_SHOWN_TEXT)
    if Offer.ROWS not in evidence.offers:
        return ()
    if evidence.references is None:
        return ("No reference models were trained: what single rows betray (LiRA, RMIA, KLoM) was not measured.",)
    retrained, originals = evidence.references.count
    return (
        f"What single rows betray was measured against {retrained} retrained and {originals} original reference models; more of "
        "them would see smaller differences.",
    )


def _general(models: Sequence[AuditedModel], sets: Mapping[str, RecordSet[Any]], settings: AuditSettings) -> list[str]:
    out = []
    if settings.relearn is None:
        out.append("Relearning was not tried: what a few steps of training would bring back is not known.")
    if not settings.quantise:
        out.append("Rounding of the weights was not tried: what it would bring back is not known.")
    retrained = sum(m.role == "retrained" for m in models)
    if not retrained:
        out.append("There is no retrained model: nothing here can show that something was forgotten.")
    elif retrained == 1:
        out.append("There is one retrained model: how much retrained models differ among themselves is not known.")
    if "holdout" not in sets and settings.access is not Level.TEXT:
        out.append("There is no holdout set: membership attacks and PrivLeak could not be run.")
    if "retain" not in sets:
        out.append("There is no retain set: lost usefulness could not be measured.")
    return out
