"""Audits of what is only served: a server's answers against those of local models, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from expunge.adapters.endpoint import Asker, Endpoint, Unanswered
from expunge.adapters.loading import tokenizer_of
from expunge.adapters.served import ServedAdapter
from expunge.audit.document import AuditDocument
from expunge.audit.metrics.registry import Need
from expunge.audit.run import AuditedModel, limited
from expunge.audit.settings import AuditSettings
from expunge.core.access import Level
from expunge.core.errors import InputError
from expunge.core.runs import Run
from expunge.core.settings import Settings
from expunge.data.records import RecordSet
from expunge.engine.outcome import Progress
from expunge.pipeline.audit import AuditConfig, audit_stage, read, retrained_models, sets_of, target_model
from expunge.pipeline.config import TextConfig, UnlearnConfig
from expunge.pipeline.models import check_source, describe_data, resolve, text_of
from expunge.pipeline.train import retraining_of
from expunge.pipeline.unlearn import Request, check_out, load_request

KIND = "served-audit"
ANSWERS = "answers.jsonl"
_TWICE = 8  #: questions that are put once more when all is measured
_NOTE = (
    "Of the served model nothing is known but its answers while this audit ran: who serves it may change it, and may answer an "
    "auditor otherwise than others."
)
_KINDS = {"policy": "policy of its guards", "fingerprint": "fingerprint", "model": "name of its model"}


class ServedConfig(Settings):
    """An audit of what is only served."""

    name: ClassVar[str] = "served audit"

    served: Endpoint = Field(description="where the model is served, and how it is asked")
    target: str | None = Field(None, description="the model before anything was forgotten: a hub id, a folder or a run")
    forget: str = Field(description="what was to be forgotten: a file or a named data set")
    retain: str | None = Field(None, description="what was to be kept")
    holdout: str | None = Field(None, description="records that no model was trained on")
    text: TextConfig = Field(default_factory=TextConfig, description="how text becomes tokens")
    audit: AuditConfig = Field(default_factory=AuditConfig, description="what is compared with, and what is measured")

    def request(self) -> UnlearnConfig:
        """The request that such a model should have fulfilled."""
        return UnlearnConfig(
            model=self.target or "", forget=self.forget, retain=self.retain, holdout=self.holdout, base=self.audit.base,
            text=self.text, allow_large_forget=True,
        )  # fmt: skip


@dataclass(frozen=True)
class ServedPlan:
    """An audit of a served model that has passed every check and has not begun.

    Attributes:
        settings: of what is measured, within the access.
        questions: that are put to each model, those of attacks not counted.
        notes: what the user must know before it begins.
    """

    config: ServedConfig
    request: Request
    sets: Mapping[str, RecordSet]
    settings: AuditSettings
    out: Path
    resume: bool
    questions: int
    notes: Sequence[str] = ()

    @property
    def models(self) -> int:
        """Models that are asked."""
        held = self.config
        return 1 + (held.target is not None) + len(held.audit.retrained) + held.audit.retrain

    def text(self) -> str:
        """What it costs, one line for people."""
        limit = self.settings.evidence_protocol().max_new_tokens
        return (
            f"{self.models} models, one of them served; {self.questions:,} questions to each, answers of at most {limit:,} "
            f"tokens, {len(self.settings.chosen_attacks())} attacks"
        )


def plan(config: ServedConfig, out: Path, *, resume: bool = False) -> ServedPlan:
    """Check data, models and server; nothing is written, and the server is asked for one word.

    Raises:
        InputError: an access that a served model does not give, data or a model that is not there, a folder in use, a server that
            does not answer, a key that it does not accept, or a model that it does not have.
    """
    asked, settings = config.request(), config.audit.settings
    if settings.access not in (None, Level.TEXT):
        raise InputError(f"A served model gives no access to {settings.access}.", "Leave --access out: it is asked in words.")
    settings = settings.within(Level.TEXT)
    check_out(out, resume)
    local = [m for m in (config.target, *config.audit.retrained) if m is not None]
    if not local:
        raise InputError(
            "There is no model to compare with.",
            "Give --target MODEL, and --retrained MODEL for each that never saw the forget set.",
        )
    request = load_request(asked)
    for source in local:
        check_source(source)
    if config.audit.retrain:
        retraining_of(asked.model, request.forget, 1, base=asked.base, retain=asked.retain)
    sets = sets_of(asked, request, config.audit.utility)
    texts = [n for n, records in sets.items() if any(r.is_text for r in records)]
    if texts and config.served.form == "chat":
        raise InputError(f"The set {texts[0]!r} holds plain texts, which no chat goes on with.", "Leave served.form out.")
    settings.chosen()
    asker = Asker(config.served)
    try:
        asker.check()
        notes = asker.notes
    finally:
        asker.close()
    used = {n: limited(r, settings) for n, r in sets.items()}
    generates = any(Need.GENERATION in m.needs for m in settings.chosen())
    questions = sum(len(r) for n, r in used.items() if generates)
    return ServedPlan(config, request, sets, settings, out, resume, questions, notes)


def audit_served(
    made: ServedPlan, *, progress: Progress | None = None, say: Callable[[str], None] = lambda _: None
) -> AuditDocument:
    """Audit what is served, and leave ``audit.json`` in a run of its own; killed, it goes on where it stopped.

    Args:
        made: the checked audit.
        progress: of the work.
        say: told what is being done.

    Raises:
        Unanswered: the server gave no answer; what it did answer is kept.
    """
    config, asked = made.config, made.config.request()
    run = Run.start(made.out, KIND, config.model_dump(mode="json"), resume=made.resume)
    run.note_inputs(**{n: describe_data(r) for n, r in made.sets.items()})
    gold = retrained_models(asked, config.audit, made.request.forget, progress, say)
    asker = Asker(config.served, made.out / ANSWERS)
    try:
        models = [*([target_model(asked)] if config.target else []), *gold, _served(config, asker)]
        title = f"{config.served.model} at {config.served.url}"
        fresh = audit_stage(
            run,
            models,
            made.sets,
            config.audit.settings.model_copy(update={"access": Level.TEXT}),
            progress=progress,
            title=title,
            notes=[_NOTE],
            after=lambda: _changed(asker),
        )
    finally:
        asker.close()
    if not fresh:
        say("audit: from an earlier run, nothing has changed since")
    return read(made.out)


def _served(config: ServedConfig, asker: Asker) -> AuditedModel:
    """The served model, its answers cut by the tokenizer of the models that it is compared with."""
    like = config.target or config.audit.retrained[0]
    adapter = ServedAdapter(asker, tokenizer_of(resolve(like)), template=text_of(like, config.text).template)
    told: dict[str, Any] = {"served": config.served.model_dump(mode="json", exclude={"key_env"})}
    return AuditedModel("served", "unlearned", adapter, path=config.served.url, method="served", settings=told)


def _changed(asker: Asker) -> list[str]:
    """What speaks for it that the served model was not one and the same all the time."""
    out = []
    if asker.too_long:
        out.append(f"{asker.too_long} questions were longer than the server takes: they count as answered without a word.")
    try:
        count, other = asker.again(_TWICE)
    except Unanswered:
        out.append("The server did not answer questions that were put twice: whether it answers alike each time is not known.")
        count, other = 0, 0
    if other:
        out.append(
            f"Of {count} questions that were put twice, {other} were answered otherwise the second time, at temperature 0."
        )
    for kind, values in sorted(asker.said.items()):
        if len(values) > 1:
            out.append(f"The {_KINDS[kind]} changed while the server was asked: its answers are not those of one model.")
    return out
