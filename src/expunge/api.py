"""The same from Python, on a model that you already hold.

>>> import expunge
>>> done = expunge.unlearn(model, tokenizer, forget=[{"question": q, "answer": a}], retain=rows, method="npo")
>>> print(done.sentence)
>>> document = expunge.audit_model(target, done.model, tokenizer, forget=..., retain=..., retrained=[twin_1, twin_2])
>>> print(document.models[-1].judgement.verdict)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from expunge.core.errors import InputError, unknown
from expunge.core.settings import nest

if TYPE_CHECKING:
    from expunge.audit.document import AuditDocument
    from expunge.data.sources import Source
    from expunge.engine.loop import Outcome, Progress


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
    parts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Outcome:
    """Make ``model`` forget records; the model is changed in place (with LoRA the result wraps it).

    Args:
        model: a transformers causal language model.
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
        alternatives: where other answers come from: auto, refusals, given, others, template.
        alternative_template: their text, for ``template``.
        parts: parameters and parts of the method, as in a configuration file: ``{"retain": "kl", "parameters": "lora"}``. Here
            ``forget`` and ``retain`` are the loss terms, not the data.
        progress: called with (done, total, text).
        **more: the same as keywords, dots as double underscores: ``beta=0.2``, ``parameters="lora"``, ``schedule__epochs=10``,
            ``engine__max_tokens=4096``.

    Returns:
        The outcome: ``model``, why it stopped (``reason``, ``sentence``, ``reached``), losses, the log.

    Raises:
        InputError: something does not fit; nothing was changed.
    """
    from expunge.adapters.language import LanguageAdapter
    from expunge.engine.options import Engine
    from expunge.pipeline import unlearn as stage
    from expunge.pipeline.config import Allowances, UnlearnConfig

    _check_tokenizer(tokenizer)
    kinds = get_args(UnlearnConfig.model_fields["alternatives"].annotation)
    if alternatives not in kinds:
        raise unknown("kind of alternatives", str(alternatives), kinds)
    given = nest({**(parts or {}), **{k.replace("__", "."): v for k, v in more.items()}})
    engine = Engine(**{"seed": seed, "checkpoint_every": 0, **given.pop("engine", {})})
    allowed = Allowances(allow_overlap=allow_overlap, drop_overlap=drop_overlap, allow_large_forget=allow_large_forget)
    request = stage.check(_request(forget, retain, holdout, columns), allowed)
    adapter = LanguageAdapter(model, tokenizer, template=template, dropout=engine.dropout)
    made = stage.plan(adapter, request, method, given, engine, how=alternatives, template=alternative_template)
    outcome, _ = stage.run_in_memory(made, progress=progress)
    return outcome


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
    from expunge.adapters.language import LanguageAdapter
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
        return AuditedModel(label, role, LanguageAdapter(model, tokenizer, template=template))

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


def _request(forget: Source, retain: Source | None, holdout: Source | None, columns: Mapping[str, str] | None) -> Any:
    from expunge.data.sources import load
    from expunge.pipeline.unlearn import Request

    return Request(
        load(forget, name="forget", columns=columns),
        load(retain, name="retain", columns=columns) if retain is not None else None,
        load(holdout, name="holdout", columns=columns) if holdout is not None else None,
    )
