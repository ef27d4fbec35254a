"""MUSE's two text metrics: verbatim memorisation of passages, and knowledge memorisation by questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from expunge.adapters.answers import Generation
from expunge.adapters.base import Adapter, Example
from expunge.audit.evidence import Evidence, Values
from expunge.audit.generations import shorten
from expunge.audit.metrics.papers import MUSE
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.audit.metrics.rouge import answers, lacks_questions, lacks_words, rouge_l, rouge_values
from expunge.audit.metrics.words import Tokeniser
from expunge.audit.scores import end_targets
from expunge.core.results import Direction
from expunge.data.records import Record
from expunge.engine.parts import Paper

STOPS = ("\n\n", "\nQuestion", "Question:")


def verbatim_memorisation(prediction: str, gold: str, tokeniser: Tokeniser = "rouge") -> float:
    """MUSE's VerbMem of one passage: ``100 * ROUGE-L F1(greedy continuation, true continuation)``, in [0, 100], no stemming.

    Raises:
        InputError: the true continuation has no words for this tokeniser.
    """
    return 100.0 * rouge_l(prediction, gold, "f1", False, tokeniser)


def knowledge_memorisation(prediction: str, gold: str, tokeniser: Tokeniser = "rouge") -> float:
    """MUSE's KnowMem of one question: ``100 * ROUGE-L F1(greedy answer, gold answer)``, in [0, 100], no stemming.

    The answer is the prediction up to the first of :data:`STOPS`; :class:`KnowledgeMemorisation` cuts it there.

    Raises:
        InputError: the gold answer has no words for this tokeniser.
    """
    return 100.0 * rouge_l(prediction, gold, "f1", False, tokeniser)


def halves(text: str, share: float) -> tuple[str, str]:
    """A text cut after ``share`` of its words (at least one on each side); the space goes to the second part."""
    starts = [i for i, c in enumerate(text) if not c.isspace() and (i == 0 or text[i - 1].isspace())]
    if len(starts) < 2:
        return text, ""
    at = starts[min(max(round(share * len(starts)), 1), len(starts) - 1)]
    while at > 0 and text[at - 1].isspace():
        at -= 1
    return text[:at], text[at:]


@metric
class VerbatimMemorisation(RecordMetric):
    """MUSE's VerbMem: does the model go on with the passage as it was written?

    Plain text is cut into a prompt (``share`` of its words) and what follows; records with a prompt are continued from it. The
    gold text is cut to ``max_new_tokens`` tokens, as much as the model may write. A plain text has no end that a model could
    have learnt: there the continuation is cut to the length of the gold text. A retrained model has more than 0 (boilerplate):
    compare with it.
    """

    name: ClassVar[str] = "verbatim-memorisation"
    title: ClassVar[str] = "Verbatim memorisation (VerbMem)"
    formula: ClassVar[str] = "100 x mean ROUGE-L F1(greedy continuation, true continuation), at most 128 new tokens"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 100.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION,)
    paper: ClassVar[Paper] = MUSE
    evaluate = staticmethod(verbatim_memorisation)
    sets: ClassVar[tuple[str, ...] | None] = ("forget", "retain")
    asks: ClassVar[bool] = True

    max_new_tokens: int = Field(128, ge=1, description="longest continuation in tokens")
    share: float = Field(0.5, gt=0, lt=1, description="share of a plain text that is its prompt")
    tokeniser: Tokeniser = Field("rouge", description="rouge: ASCII words only, as published; unicode: all scripts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Words that ROUGE can read."""
        return lacks_words(evidence, name, False, self.tokeniser)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """VerbMem of each record; absent for a text of fewer than two words."""
        records = evidence.records(name)
        parts = [self._split(r) for r in records]
        asked = [i for i, p in enumerate(parts) if p is not None]
        chosen = [p for p in parts if p is not None]
        values = np.full(len(parts), np.nan)
        if any(r.is_text for r in records):
            style = f"verbatim {self.share}"
            made = evidence.generations(
                label, name, style, lambda adapter: [adapter.encode(r, suffix="#verbatim") for r in chosen]
            )
            texts = [
                self._as_long(evidence, label, g, p) if records[i].is_text else self._cut(evidence, label, g)
                for i, g, p in zip(asked, made, chosen, strict=True)
            ]
        else:
            texts = answers(evidence, label, name, self.max_new_tokens)
        fits = (evidence.lengths(label, name)[asked] <= self.max_new_tokens).tolist()
        golds = [r.answer if fit else self._shortened(evidence, label, r) for fit, r in zip(fits, chosen, strict=True)]
        values[asked] = rouge_values(texts, golds, lambda p, g: verbatim_memorisation(p, g, self.tokeniser)).values
        return Values(values, ~np.isnan(values))

    def _as_long(self, evidence: Evidence, label: str, made: Generation, part: Record) -> str:
        example = evidence.adapter(label).encode(part)
        limit = min(self.max_new_tokens, example.n_targets - end_targets(example))
        return shorten(evidence.decoder(label), made, limit).text

    def _cut(self, evidence: Evidence, label: str, made: Generation) -> str:
        return shorten(evidence.decoder(label), made, self.max_new_tokens).text

    def _split(self, record: Record) -> Record | None:
        """What is asked of a record: itself, or the first part of a text; None if it is too short to be cut."""
        if not record.is_text:
            return record
        head, tail = halves(record.answer, self.share)
        return Record(id=record.id, prompt=head, answer=tail, subject=record.subject, verbatim=True) if tail else None

    def _shortened(self, evidence: Evidence, label: str, record: Record) -> str:
        """An answer cut to as many tokens as the model may write."""
        adapter = evidence.adapter(label)
        example = adapter.encode(record)
        return adapter.decode(adapter.collate([example]).targets[: self.max_new_tokens].tolist())


@metric
class KnowledgeMemorisation(RecordMetric):
    r"""MUSE's KnowMem: short answers to questions.

    MUSE puts ten solved questions before each one, because its models were trained on running text. A model that was
    trained on questions is asked plainly (``shots=0``, the default); with ``shots=k`` the prompt begins with k solved
    questions of the retain set, about other subjects than the one asked, as ``Question: ...\nAnswer: ...`` blocks.
    """

    name: ClassVar[str] = "knowledge-memorisation"
    title: ClassVar[str] = "Knowledge memorisation (KnowMem)"
    formula: ClassVar[str] = "100 x mean ROUGE-L F1(greedy answer, gold answer), at most 32 new tokens, cut at a new question"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 100.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION,)
    paper: ClassVar[Paper] = MUSE
    evaluate = staticmethod(knowledge_memorisation)
    sets: ClassVar[tuple[str, ...] | None] = ("forget", "retain")
    asks: ClassVar[bool] = True

    max_new_tokens: int = Field(32, ge=1, description="longest answer in tokens")
    shots: int = Field(0, ge=0, le=64, description="solved questions of the retain set in the prompt")
    tokeniser: Tokeniser = Field("rouge", description="rouge: ASCII words only, as published; unicode: all scripts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Questions, and a retain set to draw solved ones from."""
        if self.shots and "retain" not in evidence.sets:
            return "solved questions are drawn from a retain set, and there is none"
        return lacks_questions(evidence, name) or lacks_words(evidence, name, False, self.tokeniser)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """KnowMem of each record."""
        if self.shots:
            style = f"shots {self.shots}"
            made = answers(
                evidence, label, name, self.max_new_tokens, stops=STOPS, style=style,
                examples=lambda a: self._prompted(a, evidence, name),
            )  # fmt: skip
        else:
            made = answers(evidence, label, name, self.max_new_tokens, stops=STOPS)
        golds = [r.answer for r in evidence.records(name)]
        return rouge_values(made, golds, lambda p, g: knowledge_memorisation(p, g, self.tokeniser))

    def _prompted(self, adapter: Adapter, evidence: Evidence, name: str) -> Sequence[Example]:
        pool = list(evidence.records("retain"))
        order = np.random.default_rng(evidence.protocol.seed).permutation(len(pool))
        out = []
        for record in evidence.records(name):
            solved = [pool[i] for i in order if pool[i].cluster != record.cluster and pool[i].prompt][: self.shots]
            blocks = "".join(f"Question: {s.prompt}\nAnswer: {s.answer}\n\n" for s in solved)
            shown = Record(
                id=record.id, prompt=f"{blocks}Question: {record.prompt}\nAnswer:", answer=" " + record.answer,
                subject=record.subject, verbatim=True,
            )  # fmt: skip
            out.append(adapter.encode(shown, suffix=f"#shots{self.shots}"))
        return out
