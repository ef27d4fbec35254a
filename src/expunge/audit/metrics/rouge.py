"""ROUGE-L between what a model answers and what it was taught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from expunge.adapters.base import Adapter, Example
from expunge.audit.evidence import Evidence, Values, is_question
from expunge.audit.generations import cut, shorten
from expunge.audit.metrics.papers import TOFU
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.audit.metrics.words import Tokeniser, lcs_length, words
from expunge.core.errors import InputError
from expunge.core.results import Direction
from expunge.engine.parts import Paper

Kind = Literal["recall", "precision", "f1"]


def rouge_l(prediction: str, gold: str, kind: Kind = "recall", stem: bool = True, tokeniser: Tokeniser = "rouge") -> float:
    """ROUGE-L of a text against a reference, in [0, 1] (Lin 2004).

    With ``L`` the length of the longest common subsequence of words: recall ``L / |gold|``, precision ``L / |prediction|``, F1
    their harmonic mean (0 if both are 0). Equal to the rouge_score package, whose tokeniser it uses.

    Args:
        prediction: what the model wrote; may be empty (then 0).
        gold: the reference.
        kind: which of the three.
        stem: compare word stems (Porter).
        tokeniser: see :func:`~expunge.audit.metrics.words.words`.

    Raises:
        InputError: the reference has no words for this tokeniser, so that the score would be 0 whatever the model says.
    """
    reference = words(gold, stem, tokeniser)
    if not reference:
        message = f"The reference {gold[:40]!r} has no words that the tokeniser {tokeniser!r} sees."
        raise InputError(message, "Try tokeniser=unicode.")
    found = words(prediction, stem, tokeniser)
    common = lcs_length(found, reference)
    if not common:
        return 0.0
    recall, precision = common / len(reference), common / len(found)
    return {"recall": recall, "precision": precision, "f1": 2 * recall * precision / (recall + precision)}[kind]


def rouge_values(predictions: Sequence[str], golds: Sequence[str], score: Callable[[str, str], float]) -> Values:
    """``score(prediction, gold)`` for each pair; absent where the gold text has no words for the tokeniser."""
    values = np.full(len(golds), np.nan)
    for i, (prediction, gold) in enumerate(zip(predictions, golds, strict=True)):
        try:
            values[i] = score(prediction, gold)
        except InputError:
            continue
    return Values(values, ~np.isnan(values))


def answers(
    evidence: Evidence,
    label: str,
    name: str,
    max_new_tokens: int,
    *,
    stops: Sequence[str] = (),
    style: str = "answer",
    examples: Callable[[Adapter], Sequence[Example]] | None = None,
) -> list[str]:
    """A model's greedy answers to a set, at most so long, up to the first stop string; see :meth:`Evidence.generations`."""
    made = evidence.generations(label, name, style, examples)
    return [cut(shorten(evidence.decoder(label), g, max_new_tokens).text, stops) for g in made]


def lacks_questions(evidence: Evidence, name: str) -> str:
    """Why nothing can be asked on a set: its records are plain text."""
    if all(is_question(r) for r in evidence.records(name)):
        return ""
    return "it needs records with a prompt, and these are plain text"


@metric
class RougeRecall(RecordMetric):
    """TOFU's ROUGE: ROUGE-L recall of the greedy answer, with stemming.

    It rewards long answers that mention many candidates: read it beside fluency. TOFU's first code counted 200 tokens
    including the prompt; here, as in later implementations, 200 new tokens. Not measured on the holdout set.
    """

    name: ClassVar[str] = "rouge-l-recall"
    title: ClassVar[str] = "ROUGE-L recall"
    formula: ClassVar[str] = "LCS(words of the answer, words of the gold answer) / words of the gold answer; mean over records"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.GENERATION,)
    paper: ClassVar[Paper] = TOFU
    evaluate = staticmethod(rouge_l)

    max_new_tokens: int = Field(200, ge=1, description="longest answer in tokens")
    stem: bool = Field(True, description="compare word stems")
    stops: tuple[str, ...] = Field((), description="texts at which an answer is cut, such as a line end")
    tokeniser: Tokeniser = Field("rouge", description="rouge: ASCII words only, as published; unicode: all scripts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A prompt; and the holdout set is not asked, to save the time."""
        if name == "holdout":
            return "answers are generated for forget, retain and utility sets only"
        return lacks_questions(evidence, name) or lacks_words(evidence, name, self.stem, self.tokeniser)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """ROUGE-L recall of each record's answer."""
        made = answers(evidence, label, name, self.max_new_tokens, stops=self.stops)
        golds = [r.answer for r in evidence.records(name)]
        return rouge_values(made, golds, lambda p, g: rouge_l(p, g, "recall", self.stem, self.tokeniser))


def lacks_words(evidence: Evidence, name: str, stem: bool, tokeniser: Tokeniser) -> str:
    """Why ROUGE cannot read a set: no gold answer has words for the tokeniser."""
    if any(words(r.answer, stem, tokeniser) for r in evidence.records(name)):
        return ""
    return f"no gold answer has words that the tokeniser {tokeniser!r} sees (try tokeniser=unicode)"
