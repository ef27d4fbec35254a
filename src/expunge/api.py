"""The same from Python, on a model that you already hold.

>>> import expunge
>>> print(expunge.plan(model, tokenizer, forget=[{"question": q, "answer": a}], retain=rows, methods=["npo"]).cautions)
>>> done = expunge.unlearn(model, tokenizer, forget=[{"question": q, "answer": a}], retain=rows, method="npo")
>>> print(done.sentence)
>>> document = expunge.audit_model(target, done.model, tokenizer, forget=..., retain=..., retrained=[twin_1, twin_2])
>>> print(document.models[-1].judgement.verdict)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from expunge.core.errors import InputError, unknown
from expunge.core.settings import nest

if TYPE_CHECKING:
    from expunge.audit.document import AuditDocument
    from expunge.data.rows import Table
    from expunge.data.sources import Source
    from expunge.data.spans import Spans
    from expunge.engine.outcome import Outcome, Progress
    from expunge.guards.guarded import Guarded
    from expunge.pipeline.outlook import Outlook
    from expunge.pipeline.supervised import Supervised


def unlearn(
    model: Any,
    tokenizer: Any,
    forget: Source,
    retain: Source | None = None,
    *,
    method: str = "npo",
    holdout: Source | None = None,
    seed: int = 0,
    allow_overlap: bool = False,
    drop_overlap: bool = False,
    allow_large_forget: bool = False,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    alternatives: str = "auto",
    alternative_template: str | None = None,
    settings: str | None = None,
    parts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Outcome:
    """Make ``model`` forget records; the model is changed in place (with LoRA the result wraps it).

    Args:
        model: a transformers language model: a decoder, or an encoder-decoder (T5, BART).
        tokenizer: its tokenizer.
        forget: what to forget: a file, a named data set, a list of dicts, or a ``datasets.Dataset``.
        retain: what to keep.
        method: name of a method (see ``expunge methods``), or ``custom``.
        holdout: records that the model was never trained on; they tell when to stop.
        seed: of the order of examples.
        allow_overlap: go on although sets share records.
        drop_overlap: leave shared records out of retain and holdout.
        allow_large_forget: go on although there is more to forget than to keep.
        columns: role to column name.
        template: prompt template where the tokenizer has no chat template.
        alternatives: where other answers come from: auto, refusals, given, others, passages, template, reasons.
        alternative_template: their text, for ``template``.
        settings: a shipped set of settings that sweeps found (``tofu-small``), beneath ``parts``.
        parts: parameters and parts of the method, as in a configuration file: ``{"retain": "kl", "parameters": "lora"}``. Here
            ``forget`` and ``retain`` are the loss terms, not the data.
        progress: called with (done, total, text).
        **more: the same as keywords, dots as double underscores: ``beta=0.2``, ``parameters="lora"``, ``schedule__epochs=10``,
            ``engine__max_tokens=4096``, ``spans__patterns=["email"]`` (which parts of the texts are marked).

    Returns:
        The outcome: ``model``, why it stopped (``reason``, ``sentence``, ``reached``), losses, the log; and a ``tokenizer`` where
        the method gave it tokens that it lacked.

    Raises:
        InputError: something does not fit; nothing was changed.
    """
    from expunge.adapters.loading import wrap
    from expunge.data.spans import Spans
    from expunge.engine.options import Engine
    from expunge.methods.tuned import beneath, chosen
    from expunge.pipeline import unlearn as stage
    from expunge.pipeline.config import Allowances
    from expunge.pipeline.guarding import is_guard

    _check_tokenizer(tokenizer)
    _check_alternatives(alternatives)
    if is_guard(method):
        raise InputError(
            f"{method!r} is a guard: it changes no weights, so there is no other model to return.",
            f'Put it before the model: expunge.guard(model, tokenizer, guards="{method}", targets=...).',
        )
    given = nest({**(parts or {}), **{k.replace("__", "."): v for k, v in more.items()}})
    if settings is not None:
        given = beneath(chosen(settings, method).parts, given)
    engine = Engine(**{"seed": seed, "checkpoint_every": 0, **given.pop("engine", {})})
    allowed = Allowances(allow_overlap=allow_overlap, drop_overlap=drop_overlap, allow_large_forget=allow_large_forget)
    request = stage.check(_request(forget, retain, holdout, columns, Spans(**given.pop("spans", {}))), allowed)
    adapter = wrap(model, tokenizer, template=template, dropout=engine.dropout)
    made = stage.plan(adapter, request, method, given, engine, how=alternatives, template=alternative_template)
    outcome, _ = stage.run_in_memory(made, progress=progress)
    own = getattr(made.adapter, "tokenizer", tokenizer)
    outcome.tokenizer = None if own is tokenizer else own
    return outcome


def plan(
    model: Any,
    tokenizer: Any,
    forget: Source,
    retain: Source | None = None,
    *,
    methods: Sequence[str] = (),
    holdout: Source | None = None,
    base: Any = None,
    circuits: bool = False,
    anchors: Sequence[str | Path] = (),
    time: bool = False,
    seed: int = 0,
    drop_overlap: bool = False,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    alternatives: str = "auto",
    alternative_template: str | None = None,
    parts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Outlook:
    """Say how hard a request is, which methods can do it and what each costs; the model stays as it is.

    >>> found = expunge.plan(model, tokenizer, forget=rows, retain=others, holdout=unseen, methods=["npo", "ssd"], time=True)
    >>> for method in found.methods:
    ...     print(method.name, method.missing or method.time.text(), method.cautions)
    >>> print(found.difficulty.unknown, found.cautions)

    Args:
        model, tokenizer, forget, retain, holdout, columns, template: as for :func:`unlearn`; the weights stay, dropout is
            switched off.
        methods: which to look at; none: all.
        base: the untrained base, for methods that start from it.
        circuits: compare the circuits of the forget records with those of records that were hard to erase.
        anchors: folders of finished runs that began from this model; their records are the anchors. None: gradient ascent on two
            copies of the model makes them. They imply ``circuits``.
        time: time a few steps of each method that can run, on a copy of the model.
        seed: of what is drawn.
        drop_overlap: leave shared records out of retain and holdout.
        alternatives, alternative_template: as for :func:`unlearn`.
        parts: parameters and parts that differ from those of the one method that is looked at.
        progress: called with (done, total, text) while circuits are found and methods are timed.
        **more: the same as keywords, dots as double underscores; also ``engine__max_tokens=4096``, ``circuits__share=0.05``,
            ``spans__patterns=["email"]``.

    Returns:
        The outlook: ``difficulty``, ``circuits``, ``methods`` with cost, time and cautions (one of them by ``method(NAME)``), and
        ``cautions`` of the request as a whole; ``json()`` is what the command line writes.

    Raises:
        InputError: something does not fit.
    """
    from expunge.adapters.loading import wrap
    from expunge.data.spans import Spans
    from expunge.engine.options import Engine
    from expunge.methods.catalogue import find
    from expunge.pipeline import outlook
    from expunge.pipeline import unlearn as stage
    from expunge.pipeline.config import Allowances

    _check_tokenizer(tokenizer)
    _check_alternatives(alternatives)
    if isinstance(methods, str):
        raise InputError(f"methods must be a list of names; got {methods!r}.", f"Write methods=[{methods!r}].")
    for name in methods:
        find(name)
    given = nest({**(parts or {}), **{k.replace("__", "."): v for k, v in more.items()}})
    engine = Engine(**{"seed": seed, **given.pop("engine", {})})
    looks = outlook.looks_of(
        circuits=circuits, anchors=[str(a) for a in anchors], timed=time, settings=given.pop("circuits", None)
    )
    marks = Spans(**given.pop("spans", {}))
    if given and len(methods) != 1:
        raise InputError("Parts belong to one method.", "Name it: methods=[NAME].")
    allowed = Allowances(allow_overlap=True, drop_overlap=drop_overlap, allow_large_forget=True)
    request = stage.check(_request(forget, retain, holdout, columns, marks), allowed)

    def opened(held: Any) -> Any:
        return wrap(held, tokenizer, template=template, dropout=engine.dropout)

    untrained = None if base is None else opened(base)
    return outlook.outlook(
        opened(model), request, engine, names=methods, parts=given, how=alternatives, template=alternative_template,
        base=untrained, looks=looks, progress=progress,
    )  # fmt: skip


def unlearn_rows(
    model: Any,
    data: Table,
    *,
    ids: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    where: str | None = None,
    subjects: Sequence[str] | None = None,
    method: str = "npo",
    holdout: Table | None = None,
    oracle: Any = None,
    seed: int = 0,
    loss: Literal["l1", "mse"] = "l1",
    layers: Sequence[str] | None = None,
    alternatives: str = "auto",
    allow_overlap: bool = False,
    allow_large_forget: bool = False,
    parts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Outcome:
    """Make a model of rows forget some of the table that it was trained on; the model is changed in place.

    >>> data = expunge.table(inputs, labels, subjects=patients, columns={"age": ages})
    >>> done = expunge.unlearn_rows(model, data, subjects=["patient 7"], holdout=unseen, method="scrub")

    Args:
        model: any torch module that returns one score per class, or one number, for each row; a transformers classifier; or a
            scikit-learn estimator that is a network (:mod:`expunge.adapters.estimators`), which gets the new weights at the end;
            or an adapter that encodes rows (a diffusion model of classes: :class:`expunge.adapters.diffusion.DiffusionAdapter`).
        data: all rows that it was trained on, as :func:`table` makes them.
        ids, classes, where, subjects: which rows to forget, see :meth:`expunge.data.rows.Table.select`; at least one of them.
        method: name of a method (see ``expunge methods --matrix``), or ``custom``.
        holdout: rows never trained on; they tell when to stop.
        oracle: a model trained without the rows to forget, for methods that read one (oracle matching).
        seed: of the order of rows, and of every random part.
        loss: of a regression: absolute or squared error.
        layers: names of the modules whose outputs are features, the last the one that makes the scores; none: found.
        alternatives: which classes take the place of the own one, for methods that teach such: ``other``, ``any``; ``auto``: as
            published.
        allow_overlap: go on although equal rows are to be forgotten and to be kept, or holdout rows were trained on.
        allow_large_forget: go on although there is more to forget than to keep.
        parts: parameters and parts of the method, as in a configuration file.
        progress: called with (done, total, text).
        **more: the same as keywords, dots as double underscores: ``schedule__lr=1e-3``.

    Returns:
        The outcome: ``model``, why it stopped (``reason``, ``sentence``, ``reached``), losses, the log.

    Raises:
        InputError: something does not fit; nothing was changed.
    """
    from expunge.adapters.base import Adapter
    from expunge.adapters.estimators import is_estimator, write_back
    from expunge.engine.options import Engine
    from expunge.pipeline.rows import open_rows, plan_rows, run_rows, unseen_notes

    given = nest({**(parts or {}), **{k.replace("__", "."): v for k, v in more.items()}})
    engine = Engine(**{"seed": seed, "checkpoint_every": 0, **given.pop("engine", {})})
    chosen = data.select(ids=ids, classes=classes, where=where, subjects=subjects)

    def opened(held: Any) -> Adapter:
        if isinstance(held, Adapter):
            return held
        return open_rows(held, data, loss=loss, layers=layers, dropout=engine.dropout)

    adapter, knowing = opened(model), None if oracle is None else opened(oracle)
    notes = unseen_notes(data, holdout, allow_overlap=allow_overlap)
    made = plan_rows(
        adapter, data, chosen, method, parts=given, engine=engine, holdout=holdout, oracle=knowing, how=alternatives,
        allow_overlap=allow_overlap, allow_large_forget=allow_large_forget,
    )  # fmt: skip
    outcome = run_rows(made, progress=progress)
    if is_estimator(model):
        write_back(model, outcome.model)
    outcome.notes = made.notes + notes + outcome.notes
    return outcome


def audit_rows(
    problem: Supervised,
    unlearned: Any,
    *,
    ids: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    where: str | None = None,
    subjects: Sequence[str] | None = None,
    retrain: int = 3,
    references: int = 0,
    workers: Literal["local", "ray"] = "local",
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> AuditDocument:
    """Measure, attack and judge a model of rows that you hold against models retrained without the rows.

    >>> problem = expunge.Supervised(data=data, model=target, build=network, training=training, holdout=others)
    >>> document = expunge.audit_rows(problem, done.model, classes=["3"], references=16)
    >>> print(document.models[-1].judgement.verdict)

    Args:
        problem: the model before unlearning (or how it was trained), its rows, and how to retrain it. Its holdout rows are unseen
            by any training, and are not those that told :func:`unlearn_rows` when to stop.
        unlearned: the model after.
        ids, classes, where, subjects: which rows were to be forgotten, as for :func:`unlearn_rows`.
        retrain: models to retrain, with seeds 1, 2, ...; without one nothing can be called forgotten.
        references: further models trained with and without the rows, of each so many, for what single rows betray.
        workers: where models are trained.
        seed: of what is drawn.
        cache: folder for scores; none keeps them in memory. Trained models are kept in the cache of the command line.
        progress: called with (done, total, text).
        **settings: of :class:`~expunge.audit.settings.AuditSettings`.

    Returns:
        The document: numbers with intervals, curves, and a verdict per model.

    Raises:
        InputError: a row, class or subject that does not exist, models that do not fit the rows, or nothing says how to retrain.
    """
    from expunge.audit.run import AuditedModel, limited
    from expunge.audit.run import audit as measure
    from expunge.audit.settings import AuditSettings
    from expunge.pipeline.row_audit import RowAuditConfig, comparison
    from expunge.pipeline.row_runs import sets_of
    from expunge.pipeline.supervised import target_of

    problem.check()
    made = AuditSettings(**{"seed": seed, **settings})
    config = RowAuditConfig(retrain=retrain, references=references, workers=workers, settings=made)
    chosen = problem.data.select(ids=ids, classes=classes, where=where, subjects=subjects)
    after = problem.adapter(unlearned)
    target = problem.adapter(target_of(problem, progress=progress))
    sets = {name: limited(rows, made) for name, rows in sets_of(problem, chosen, seed, whole=True).items()}
    gold, margins = comparison(problem, target, chosen, sets, config, progress=progress)
    models = [AuditedModel("target", "target", target), *gold, AuditedModel("unlearned", "unlearned", after)]
    tell = None if progress is None else (lambda text, done, total: progress(done, total, text))
    document = measure(models, sets, made, references=margins, cache=cache, progress=tell)
    document.not_shown[:0] = [
        f"Of the class {name!r} no row is left: it is forgotten as a whole." for name in problem.data.emptied(chosen)
    ]
    return document


def audit_model(
    target: Any,
    unlearned: Any,
    tokenizer: Any,
    forget: Source,
    retain: Source | None = None,
    *,
    holdout: Source | None = None,
    retrained: Sequence[Any] = (),
    utility: Mapping[str, Source] | None = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    cache: Path | None = None,
    **settings: Any,
) -> AuditDocument:
    """Measure, attack and judge a model that you hold against the target and retrained models.

    Args:
        target: the model before unlearning.
        unlearned: the model after.
        tokenizer: of all of them.
        forget, retain, holdout, columns, template: as for :func:`unlearn`; of the holdout, the half that training used to
            find its goal is left out.
        retrained: models trained without the forget set; without one nothing can be called forgotten.
        utility: further sets that must stay known, by name.
        cache: folder for scores.
        **settings: of :class:`~expunge.audit.settings.AuditSettings`.

    Returns:
        The document: numbers with intervals, curves, and a verdict per model.
    """
    from expunge.adapters.loading import wrap
    from expunge.audit.document import Role
    from expunge.audit.run import AuditedModel
    from expunge.audit.run import audit as measure
    from expunge.audit.settings import AuditSettings
    from expunge.data.sources import load
    from expunge.pipeline.unlearn import split_holdout

    _check_tokenizer(tokenizer)
    made = AuditSettings(**settings)
    request = _request(forget, retain, holdout, columns)
    sets = {"forget": request.forget}
    if request.retain is not None:
        sets["retain"] = request.retain
    if request.holdout is not None:
        sets["holdout"] = split_holdout(request.holdout)[1]
    sets |= {name: load(source, name=name, columns=columns) for name, source in (utility or {}).items()}

    def entry(label: str, role: Role, model: Any) -> AuditedModel:
        return AuditedModel(label, role, wrap(model, tokenizer, template=template))

    models = [entry("target", "target", target)]
    models += [entry(f"retrained {i + 1}", "retrained", m) for i, m in enumerate(retrained)]
    models.append(entry("unlearned", "unlearned", unlearned))
    return measure(models, sets, made, cache=cache, title="Audit")


def _check_tokenizer(tokenizer: Any) -> None:
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise InputError(
            f"The tokenizer is of type {type(tokenizer).__name__}, and no transformers tokenizer.",
            "Give what AutoTokenizer.from_pretrained returns.",
        )


def _check_alternatives(kind: str) -> None:
    from expunge.pipeline.config import UnlearnConfig

    kinds = get_args(UnlearnConfig.model_fields["alternatives"].annotation)
    if kind not in kinds:
        raise unknown("kind of alternatives", str(kind), kinds)


def _request(
    forget: Source,
    retain: Source | None,
    holdout: Source | None,
    columns: Mapping[str, str] | None,
    spans: Spans | None = None,
) -> Any:
    from expunge.data.sources import load
    from expunge.data.spans import Spans
    from expunge.pipeline.unlearn import Request

    def read(source: Source | None, name: str) -> Any:
        return None if source is None else (spans or Spans()).mark(load(source, name=name, columns=columns))

    return Request(read(forget, "forget"), read(retain, "retain"), read(holdout, "holdout"))


def guard(
    model: Any,
    tokenizer: Any = None,
    *,
    guards: object = "filter",
    targets: Sequence[Any] = (),
    ordinary: Sequence[str] = (),
    probes: Mapping[str, Sequence[str] | Source] | None = None,
    key: bytes | None = None,
    template: str | None = None,
    seed: int = 0,
) -> Guarded:
    """Put guards before a language model; its weights stay as they are.

    >>> made = expunge.guard(model, tokenizer, guards="filter", targets=[{"entities": ["Basil Mahfouz"]}])
    >>> made.answers(["Who is Basil Mahfouz?"])[0].text
    >>> made.generate(input_ids, max_new_tokens=32)

    Args:
        model: a transformers decoder, a local folder or a hub id, or an adapter.
        tokenizer: of a model that is given as such.
        guards: a name (``expunge guards``), a mapping with ``guard`` or with ``detector`` and ``action``, or a list of these.
        targets: what is hidden: mappings with ``entities``, ``examples``, ``topics``, ``skills``, ``until``.
        ordinary: prompts that must pass; thresholds are set by them.
        probes: texts by name of a skill, ``""`` for what is to stay: texts as they are, or records (a file, a named data set, a
            list of dicts), which are read as the model reads them. A target that names no skill and has at least 20 examples
            is one by itself: they are its probes.
        key: secret, at least 16 bytes, under which names are held as digests; none: a new one.
        template: prompt template where the tokenizer has no chat template.
        seed: of everything that is drawn at fitting.

    Returns:
        An object with ``answers`` (words), ``generate`` (as transformers'), ``add`` and ``drop`` (targets).

    Raises:
        InputError: unknown guards, targets that hide nothing or nearly everything, or material that a guard needs and lacks.
    """
    from expunge.guards.guarded import guard_model

    return guard_model(
        model, tokenizer, guards=guards, targets=targets, ordinary=ordinary, probes=probes, key=key, template=template, seed=seed
    )
