"""Short answers: with copied words not counted, and against several right answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import RWKU
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.audit.metrics.rouge import answers, lacks_questions, rouge_l
from expunge.audit.metrics.words import Tokeniser, lcs_length, words
from expunge.core.errors import InputError
from expunge.core.results import Direction
from expunge.data.records import Record
from expunge.engine.parts import Paper

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_POINTS = str.maketrans("", "", string.punctuation)


def echo_corrected_recall(prediction: str, gold: str, prompt: str, tokeniser: Tokeniser = "rouge") -> float:
    """ROUGE-L recall with no reward for words that the prompt itself contains, in [0, 1].

    Words of the prompt are taken out of the gold answer before it is compared. Where the prompt contains the whole
    gold answer (a multiple-choice probe), nothing would be left; there it is the ROUGE-L F1, so that naming one
    option counts and repeating all of them does not.

    Raises:
        InputError: the gold answer has no words for this tokeniser.
    """
    reference, known = words(gold, False, tokeniser), set(words(prompt, False, tokeniser))
    if not reference:
        raise InputError(
            f"The reference {gold[:40]!r} has no words that the tokeniser {tokeniser!r} sees.", "Try tokeniser=unicode."
        )
    new = [w for w in reference if w not in known]
    if not new:
        return rouge_l(prediction, gold, "f1", False, tokeniser)
    return lcs_length(words(prediction, False, tokeniser), new) / len(new)


def plain_words(text: str) -> list[str]:
    """Words of a short answer as question-answering scores see them: lower case, no punctuation, no articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_POINTS)).split()


def answer_score(prediction: str, golds: tuple[str, ...], kind: Literal["f1", "exact"] = "f1") -> float:
    """The best agreement of an answer with any right one, in [0, 1]: F1 over words as bags, or equality (SQuAD, TriviaQA).

    Raises:
        InputError: there is no right answer.
    """
    if not golds:
        raise InputError("An answer needs at least one right one to be compared with.")
    return max(_agreement(plain_words(prediction), plain_words(g), kind) for g in golds)


def _agreement(said: list[str], gold: list[str], kind: Literal["f1", "exact"]) -> float:
    if kind == "exact" or not said or not gold:
        return float(said == gold)
    common = sum((Counter(said) & Counter(gold)).values())
    return 2 * common / (len(said) + len(gold))


def stated(text: str, after: str) -> str:
    """What a text states after the first ``after`` (in any case) up to the next full stop; the whole text if it is not there."""
    if not after:
        return text
    at = text.lower().find(after.lower())
    if at < 0:
        return text
    return text[at + len(after) :].split(".", maxsplit=1)[0].strip()


@metric
class EchoCorrectedRecall(RecordMetric):
    """ROUGE-L recall of the answer without the words that its prompt contains.

    Probes that list options or hint at the answer are passed by repeating the prompt. Beside the plain recall this one shows how
    much of it is an echo.
    """

    name: ClassVar[str] = "echo-corrected-recall"
    title: ClassVar[str] = "Echo-corrected recall"
    formula: ClassVar[str] = "ROUGE-L recall over words that are not in the prompt; where all are, ROUGE-L F1"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION,)
    paper: ClassVar[Paper] = RWKU
    evaluate = staticmethod(echo_corrected_recall)
    on_request: ClassVar[bool] = True

    max_new_tokens: int = Field(30, ge=1, description="longest answer in tokens")
    stops: tuple[str, ...] = Field(("\n",), description="texts at which an answer is cut")
    tokeniser: Tokeniser = Field("rouge", description="rouge: ASCII words only, as published; unicode: all scripts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A prompt; the holdout set is not asked."""
        return "answers are generated for other sets only" if name == "holdout" else lacks_questions(evidence, name)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The corrected recall of each record's answer; absent where the gold answer has no words."""
        made = answers(evidence, label, name, self.max_new_tokens, stops=self.stops)
        values = np.full(len(made), np.nan)
        for i, (said, record) in enumerate(zip(made, evidence.records(name), strict=True)):
            if words(record.answer, False, self.tokeniser):
                values[i] = echo_corrected_recall(said, record.answer, _asked(record), self.tokeniser)
        return Values(values, ~np.isnan(values))


@metric
class ShortAnswer(RecordMetric):
    """Agreement of a short answer with the nearest of the right ones: F1 over words, or equality.

    A record's alternatives are further right answers. ``after`` takes the answer out of a chain of thought.
    """

    name: ClassVar[str] = "short-answer"
    title: ClassVar[str] = "Short answer"
    formula: ClassVar[str] = "max over right answers of F1(words) or [words equal]; lower case, no punctuation, no articles"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION,)
    paper: ClassVar[Paper] = RWKU
    evaluate = staticmethod(answer_score)
    on_request: ClassVar[bool] = True

    max_new_tokens: int = Field(30, ge=1, description="longest answer in tokens")
    kind: Literal["f1", "exact"] = Field("f1", description="F1 over words, or equality")
    after: str = Field("", description="the answer is what follows this phrase up to a full stop, e.g. 'the answer is'")
    stops: tuple[str, ...] = Field((), description="texts at which an answer is cut")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A prompt; the holdout set is not asked."""
        return "answers are generated for other sets only" if name == "holdout" else lacks_questions(evidence, name)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The agreement of each record's answer."""
        made = answers(evidence, label, name, self.max_new_tokens, stops=self.stops)
        records = evidence.records(name)
        scores = [
            answer_score(stated(m, self.after), (r.answer, *r.alternatives), self.kind)
            for m, r in zip(made, records, strict=True)
        ]
        return Values(np.array(scores), np.ones(len(scores), dtype=bool))


def _asked(record: Record) -> str:
    return record.prompt or " ".join(text for _, text in record.messages)
