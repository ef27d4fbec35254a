"""Extraction with both models: what changed between the target and the unlearned model points to what was unlearned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Example
from expunge.adapters.combination import Combination
from expunge.adapters.combined import join
from expunge.adapters.language import LanguageAdapter
from expunge.audit.attacks.inside import Arrays, kept, record_number, target_of
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import GUIDED
from expunge.audit.metrics.registry import Range
from expunge.audit.metrics.rouge import lacks_words, rouge_l, rouge_values
from expunge.audit.scores import by_length
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.intervals import Floats
from expunge.core.results import Direction, Number
from expunge.data.records import Record
from expunge.engine.parts import Paper


class Guidance(Combination):
    """``w z_pre + (1 - w) z_post`` over the tokens that the first model finds at most ``cutoff`` nats less likely than its best.

    Scores differ from log-probabilities by a number that is the same for all tokens, so the likeliest token is that of
    ``w log p_pre + (1 - w) log p_post``, and nothing has to be exponentiated.
    """

    name: ClassVar[str] = "guidance"

    cutoff: float | None = Field(None, gt=0, description="nats below the likeliest token; none: all tokens")

    @classmethod
    def of(cls, weight: float, cutoff: float | None) -> Guidance:
        """The guidance of weight ``w``."""
        share = None if cutoff is None else math.exp(-cutoff)
        return cls(target_weight=weight, weight=1 - weight, centred=False, filter=share, cutoff=cutoff)

    def kept(self, target: Tensor) -> Tensor:
        """Tokens within the cutoff, however few."""
        if self.cutoff is None:
            return super().kept(target)
        return target > target.amax(-1, keepdim=True) - self.cutoff


def guided(pre: LanguageAdapter, post: LanguageAdapter, weight: float, cutoff: float | None) -> LanguageAdapter:
    """Both models as one that generates by :class:`Guidance`; neither is copied or changed.

    Args:
        pre: the model before unlearning.
        post: the model after it, of the same tokenizer.
        weight: w; 1 is the first model alone, 0 the second, more than 1 goes beyond the first, away from the second.
        cutoff: see :class:`Guidance`.

    Raises:
        InputError: the tokenizers differ, or the first is no plain model.
    """
    return join(pre, post, Guidance.of(weight, cutoff))


@attack
class GuidedExtraction(Attack):
    """Answers written by the target, guided away from the unlearned model (Wu et al. 2025, "Unlearned but Not Forgotten").

    Who holds both models can see what the unlearning took away. Each token is the likeliest by ``w log p_pre + (1 - w) log
    p_post`` with ``w > 1``, among those within ``cutoff`` nats of the target's likeliest. The value is the ROUGE-L recall of
    the true answer. It works where the target knows the text in part: what it knows by heart it says without help, and a
    large ``w`` then spoils it.

    Every retrained model in the role of the unlearned one helps in the same way, that is what the attack's paper says of
    exact unlearning. So the number is not judged: compare it with the retrained models', and read ``gain``, what it adds to
    the target's own answer.
    """

    name: ClassVar[str] = "guided-extraction"
    title: ClassVar[str] = "Guided extraction with both models"
    formula: ClassVar[str] = "ROUGE-L recall of argmax_v w log p_pre(v) + (1-w) log p_post(v), log p_pre(v) > max - cutoff"
    paper: ClassVar[Paper] = GUIDED
    access: ClassVar[Access] = Access.BOTH
    criterion: ClassVar[Criterion] = Criterion.TWO_MODELS
    convicts: ClassVar[bool] = False
    passes: ClassVar[str] = "one generation by two models, both in memory"
    range: ClassVar[Range] = (0.0, 1.0)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE, Offer.ASSISTANT})

    weight: float = Field(2.0, ge=0, le=10, description="w: more than 1 goes away from the unlearned model")
    cutoff: float | None = Field(5.0, gt=0, description="nats below the target's likeliest token; none: all tokens")
    share: float = Field(0.5, gt=0, lt=1, description="share of the words of a plain text that is given; questions are asked")
    max_new_tokens: int = Field(64, ge=1, description="longest answer in tokens")
    success: float = Field(0.9, gt=0, lt=1, description="recall above which a text counts as extracted")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A target, and words to look for."""
        return lacks_words(evidence, name, True, "rouge") if target_of(evidence) else "it needs the target model"

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The target."""
        return {"target": evidence.subject(target_of(evidence)).fingerprint}

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Recall of each record's answer, or of the rest of its text."""

        def make() -> Arrays:
            asked = [self._asked(r) for r in evidence.records(name)]
            post = evidence.adapter(label)  # held here, so that both are in memory
            pre = evidence.adapter(target_of(evidence))
            try:
                made = self._written(pre, post, asked, evidence.protocol.batch_tokens)
            except InputError as error:
                evidence.miss(f"{self.title} was not tried on {label!r}: {error.message}")
                return {"values": np.full(len(asked), np.nan)}
            found = rouge_values(made, [r.answer for r in asked], lambda p, g: rouge_l(p, g, "recall"))
            return {"values": np.where(found.present, found.values, np.nan)}

        values = kept(self, evidence, label, name, part="recall", make=make)["values"].astype(np.float64)
        return Values(values, ~np.isnan(values))

    def _asked(self, record: Any) -> Record:
        """A text with its beginning as the prompt; a question as it is."""
        found: Record = record
        if not found.is_text:
            return found
        words = found.answer.split()
        cut = max(1, round(self.share * len(words)))
        head, tail = " ".join(words[:cut]), " " + " ".join(words[cut:])
        return replace(found, prompt=head, answer=tail, verbatim=True, spans=()) if words[cut:] else found

    def _written(self, pre: Any, post: Any, asked: list[Record], batch_tokens: int) -> list[str]:
        both = guided(pre, post, self.weight, self.cutoff)
        examples: list[Example] = [both.encode(r) for r in asked]
        out = [""] * len(examples)
        for chosen in by_length([e.size - e.n_targets + self.max_new_tokens for e in examples], batch_tokens):
            found = both.generate(both.model, [examples[i] for i in chosen], self.max_new_tokens)
            for i, generation in zip(chosen, found, strict=True):
                out[i] = generation.text
        return out

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """Recall, its gain over the target's own answers, and the share of texts that are extracted."""
        out = super().compute(evidence, label)
        for name in ("forget",):
            if f"{name}.{self.name}" not in out:
                continue
            own, alone = (self._recall(evidence, n, name) for n in (label, target_of(evidence)))
            parts = {
                "gain": (own - alone, (-1.0, 1.0), "recall beyond that of the target's own answer"),
                "success": (
                    np.where(np.isnan(own), np.nan, own > self.success),
                    (0.0, 1.0),
                    f"share of recalls above {self.success:g}",
                ),
            }
            for key, (values, range_, note) in parts.items():
                number = record_number(evidence, name, np.asarray(values, float), Direction.REFERENCE, range=range_, note=note)
                if number is not None:
                    out[f"{name}.{self.name}.{key}"] = number
        return out

    def _recall(self, evidence: Evidence, label: str, name: str) -> Floats:
        found = self.values(evidence, label, name)
        return np.where(found.present, found.values, np.nan)
