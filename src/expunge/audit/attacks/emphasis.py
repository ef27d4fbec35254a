"""Which words of a question bring the answer up, and what comes back when they are stressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from expunge.adapters.base import Example
from expunge.audit.asking import Ask, asking, encoded, told
from expunge.audit.attacks.prompting import Heard
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.facts import question_of
from expunge.audit.generations import seed_of
from expunge.audit.metrics.papers import UNPACT
from expunge.audit.metrics.registry import Range, mean_number
from expunge.audit.metrics.rouge import lacks_questions
from expunge.audit.scores import Floats, score
from expunge.core.access import Offer
from expunge.core.results import Direction, Number
from expunge.data.records import Record
from expunge.engine.parts import Paper


def shortened(text: str) -> list[str]:
    """A text without each of its words, one word at a time; words are what white space separates."""
    parts = text.split()
    return [" ".join(parts[:i] + parts[i + 1 :]) for i in range(len(parts))]


def contributions(whole: float, without: Floats) -> Floats:
    """``C_i = LP(x, y) - LP(x without x_i, y)``, with LP the mean log-probability of the answer's tokens.

    They need not sum to ``LP(x, y)``: words share what they do.

    Args:
        whole: mean log-probability of the answer after the whole question.
        without: after the question without each of its words ``[n]``.
    """
    return np.asarray(whole - without, dtype=np.float64)


def most(values: Floats, k: int) -> frozenset[int]:
    """Places of the ``k`` largest positive contributions; the first ones on a tie."""
    order = np.argsort(-values, kind="stable")[:k]
    return frozenset(int(i) for i in order if values[i] > 0)


@attack
class KeywordEmphasis(Heard, Attack):
    """The words of the question that carry the answer, found under the target, are stressed in the prompt (unPact).

    The contribution of a word to the true answer is what the answer's mean log-probability loses when the word is left out of
    the question: whole words, one at a time, all in one batched pass. The ``words`` largest under the *target* are the key
    words. They are named again after the question; the weights are not touched. The paper does not print its template; this one
    is ours.

    Reported beside the rate: ``recovery``, the share of the answers that the target gives rightly and the model, asked plainly,
    does not, which the stressed question brings back whole; ``random``, the same with as many other words of the question (the
    control: it must bring back less); ``overlap``, how many of the key words still are the model's own.
    """

    name: ClassVar[str] = "keyword-emphasis"
    title: ClassVar[str] = "Keyword emphasis"
    formula: ClassVar[str] = "share of the fact told after question + stressed key words; C_i = LP(x, y) - LP(x without x_i, y)"
    paper: ClassVar[Paper] = UNPACT
    access: ClassVar[Access] = Access.BOTH
    criterion: ClassVar[Criterion] = Criterion.PROMPTS
    passes: ClassVar[str] = "3 generations, and one pass per word of the question"
    range: ClassVar[Range] = (0.0, 1.0)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE, Offer.LOSSES})
    evaluate = staticmethod(contributions)

    words: int = Field(3, ge=1, description="key words that are stressed, at most")
    stress: str = Field(
        " Focus on: {words}.", pattern=r"\{words\}", description="what is put after the question, with {words} in it"
    )

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A prompt, and the target."""
        if not evidence.labels("target"):
            return "it needs the target model, under which the key words are found"
        return lacks_questions(evidence, name)

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The target, which names the key words."""
        return {"target": evidence.subject(evidence.labels("target")[0]).fingerprint}

    def contributions(self, evidence: Evidence, label: str, name: str) -> list[Floats]:
        """The contribution of each word of each question to its true answer under a model."""
        key = ("contributions", evidence.subject(label).fingerprint, name)
        return evidence.memo(key, lambda: self._contributions(evidence, label, name))

    def _contributions(self, evidence: Evidence, label: str, name: str) -> list[Floats]:
        adapter, at = evidence.adapter(label), evidence.protocol
        examples: list[Example] = []
        sizes = []
        for record in evidence.records(name):
            texts = [question_of(record), *(t for t in shortened(question_of(record)) if t)]
            examples += [encoded(adapter, Ask(asking(record, t)), f"#less{i}") for i, t in enumerate(texts)]
            sizes.append(len(texts))
        found = score(
            adapter, examples, store=evidence.store, fingerprint=evidence.subject(label).fingerprint,
            batch_tokens=at.batch_tokens, shard_examples=at.shard_examples, progress=evidence.progress,
            what=f"{label}: contributions of words",
        )  # fmt: skip
        parts = np.split(-found.nll(), np.cumsum(sizes)[:-1])
        return [contributions(float(p[0]), p[1:]) for p in parts]

    def columns(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """Rates of the stressed question, of other words stressed, of the plain question; overlap of the key words."""
        records = list(evidence.records(name))
        target = self.contributions(evidence, evidence.labels("target")[0], name)
        own = self.contributions(evidence, label, name)
        keys = [most(c, self.words) for c in target]
        rounds = {
            "": [self._stressed(r, sorted(k)) for r, k in zip(records, keys, strict=True)],
            "random": [self._stressed(r, self._others(evidence, r, k)) for r, k in zip(records, keys, strict=True)],
            "plain": records,
        }
        overlap = [len(k & most(c, self.words)) / len(k) if k else np.nan for k, c in zip(keys, own, strict=True)]
        return {**{n: self._rates(evidence, label, name, n, asked) for n, asked in rounds.items()}, "overlap": _all(overlap)}

    def _rates(self, evidence: Evidence, label: str, name: str, part: str, asked: Sequence[Record]) -> Values:
        asks: list[Ask | None] = [Ask(r) for r in asked]
        style, suffix = f"{self.name} {self.model_dump_json()} {part}", f"#stressed{part}"
        texts = told(evidence, label, name, asks, self.max_new_tokens, style=style, suffix=suffix)
        return _all([np.nan if t is None else self.rate(r, t) for r, t in zip(asked, texts, strict=True)])

    def _stressed(self, record: Record, chosen: Sequence[int]) -> Record:
        parts = question_of(record).split()
        named = ", ".join(parts[i].strip(".,;:?!\"'()") for i in chosen)
        return asking(record, question_of(record) + self.stress.replace("{words}", named)) if named else record

    def _others(self, evidence: Evidence, record: Record, keys: frozenset[int]) -> list[int]:
        """As many other words of the question, drawn by the seed of the audit and the record."""
        rest = [i for i in range(len(question_of(record).split())) if i not in keys]
        rng = np.random.default_rng(seed_of(evidence.protocol.seed, record.id))
        return sorted(int(i) for i in rng.permutation(rest)[: len(keys)])

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The rate, its control, the recovery, the control's recovery, and the overlap of key words."""
        out = super().compute(evidence, label)
        if f"forget.{self.name}" not in out:
            return out
        target = evidence.labels("target")[0]
        knew = self.column(evidence, target, "forget", "plain").values == 1
        lost = knew & (self.column(evidence, label, "forget", "plain").values < 1)
        for part, column, note in (
            ("recovery", "", "of the answers that the target gives rightly and this model, asked plainly, does not"),
            ("recovery-random", "random", "the same with other words stressed: the control"),
        ):
            found = self.column(evidence, label, "forget", column)
            self._add(evidence, out, part, Values(np.where(found.values == 1, 1.0, 0.0), lost & found.present), note)
        overlap = self.column(evidence, label, "forget", "overlap")
        self._add(evidence, out, "overlap", overlap, "share of the target's key words that are the model's own too")
        return out

    def _add(self, evidence: Evidence, out: dict[str, Number], part: str, found: Values, note: str) -> None:
        number = mean_number(evidence, "forget", found, Direction.REFERENCE, self.range)
        if number is not None:
            out[f"forget.{self.name}.{part}"] = number.model_copy(update={"note": f"{note} ({int(found.present.sum())})"})


def _all(values: Sequence[float] | npt.NDArray[np.float64]) -> Values:
    array = np.asarray(values, dtype=np.float64)
    return Values(array, ~np.isnan(array))
