"""What an audit will cost, said before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge.audit.metrics.registry import Need
from expunge.audit.run import limited
from expunge.audit.settings import AuditSettings
from expunge.core.access import Level
from expunge.core.files import size
from expunge.data.records import RecordSet
from expunge.pipeline.guarding import is_guarded, target_of
from expunge.pipeline.models import resolve


@dataclass(frozen=True)
class AuditCost:
    """An estimate of an audit without the cache: ``texts``, ``tokens``, ``answers`` and the attacks are per model.

    Attributes:
        models: how many are measured.
        retrain: how many of them must be trained first, with ``retrain_steps`` steps each (0: not known).
        texts, tokens: what is scored.
        answers, answer_tokens: prompts to be continued, and at most how many tokens for each.
        relearn_steps: training steps on copies.
        roundings: copies with rounded weights, each scored on the forget set.
        memory: bytes of the weights, and of training a copy where relearning is tried; activations come on top.
    """

    models: int
    retrain: int
    retrain_steps: int
    texts: int
    tokens: int
    answers: int
    answer_tokens: int
    relearn_steps: int
    roundings: int
    memory: int

    def text(self) -> str:
        """One line for people."""
        first = ""
        if self.retrain:
            steps = f" ({self.retrain_steps:,} steps each)" if self.retrain_steps else ""
            first = f", {self.retrain} of them to be trained first{steps}"
        attacks = [f"relearning of {self.relearn_steps:,} steps"] if self.relearn_steps else []
        attacks += [f"{self.roundings} roundings of the weights"] if self.roundings else []
        return (
            f"{self.models} models{first}; for each {self.texts:,} texts scored ({self.tokens:,} tokens), {self.answers:,} "
            f"answers of at most {self.answer_tokens:,} tokens{''.join(', ' + a for a in attacks)}; at least "
            f"{size(self.memory)} of memory. What the cache holds is not computed again"
        )

    def json(self) -> dict[str, Any]:
        """A plain mapping."""
        return asdict(self)


def audit_cost(
    run: Path, sets: Mapping[str, RecordSet], settings: AuditSettings, *, models: int, retrain: int, retrain_steps: int
) -> AuditCost:
    """Estimate an audit from its sets and the run's own tokenizer; the template's own tokens are not counted."""
    used = {name: limited(records, settings) for name, records in sets.items()}
    needs = {n for m in settings.chosen() for n in m.needs}
    texts: list[str] = []
    for records in used.values():
        for r in records:
            prompt = "\n".join([content for _, content in r.messages]) or r.prompt
            wrong = r.perturbed if Need.PERTURBED in needs else ()
            right = (r.paraphrase,) if r.paraphrase and Need.PARAPHRASE in needs else ()
            scored = () if settings.access is Level.TEXT else (r.answer, *right, *wrong)
            texts += [f"{prompt} {answer}".strip() for answer in scored]
    asked = [r for name, records in used.items() if name != "holdout" for r in records if not r.is_text]
    relearn = settings.relearn
    model = text_model(run / "model")
    weights = sum(p.stat().st_size for p in Path(model).glob("*.safetensors"))
    return AuditCost(
        models, retrain, retrain_steps, len(texts), _tokens(model, texts),
        len(asked) if Need.GENERATION in needs else 0, settings.evidence_protocol().max_new_tokens,
        relearn.steps[-1] * len(relearn.rates or relearn.relative) if relearn else 0, len(settings.quantise),
        weights * (5 if relearn else 1),
    )  # fmt: skip


def text_model(folder: Path) -> str:
    """Where the tokenizer of a run's model is: of a guard's run that of the model behind it."""
    return resolve(target_of(folder)) if is_guarded(folder) else str(folder)


def _tokens(model: str, texts: Sequence[str]) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    at = range(0, len(texts), 1000)
    return sum(len(ids) for i in at for ids in tokenizer(list(texts[i : i + 1000]), verbose=False)["input_ids"])
