"""What the model can say by heart, from teacher-forced hits: extraction strength and exact memorisation."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import EXACT, EXTRACTION
from expunge.audit.metrics.probability import present
from expunge.audit.metrics.registry import Need, Range, RecordMetric, metric
from expunge.audit.scores import End
from expunge.core.errors import InputError
from expunge.core.results import Direction
from expunge.engine.parts import Paper


def extraction_strength(hits: ArrayLike) -> float:
    """Share of the answer in its longest suffix that greedy decoding reproduces, ``ES = 1 - k*/T``, in [0, 1].

    ``k*`` is the least number of answer tokens after which every further token is the model's first choice. Teacher-forced
    first choices equal greedy generation from the prefix, so one forward pass replaces T generations. A common
    implementation stops its search one step early: there a wrong one-token answer scores 1 and no answer less than ``1/T``; here
    hits (0) give 0 and (0, 0, 0) give 0.

    Args:
        hits: whether each answer token is the argmax ``[T]``, bool or 0/1.

    Raises:
        InputError: there is no token.
    """
    wrong = np.flatnonzero(~_bools(hits))
    length = len(np.asarray(hits))
    return float(1.0 - (wrong[-1] + 1) / length) if len(wrong) else 1.0


def exact_memorisation(hits: ArrayLike) -> float:
    """Share of answer tokens that are the model's first choice given the true prefix, ``(1/T) sum_t hit_t``, in [0, 1].

    Args:
        hits: whether each answer token is the argmax ``[T]``, bool or 0/1.

    Raises:
        InputError: there is no token.
    """
    return float(_bools(hits).mean())


def _bools(hits: ArrayLike) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    values = np.asarray(hits).astype(bool)
    if values.size == 0:
        raise InputError("An answer without tokens can be neither remembered nor forgotten.")
    return values


class _Hits(RecordMetric):
    """A metric of the hits of each answer; the appended end token does not count by default: it is guessed, not remembered."""

    end: End = Field("exclude", description="whether the appended end token counts")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Nothing: every record has an answer."""
        return ""

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The metric of each record's hits; absent where nothing but an end token is supervised."""
        scores = evidence.scores(label, name)
        counts = scores.counts - (scores.ends if self.end == "exclude" else 0)
        return present(scores.reduce(type(self).evaluate, "hit", end=self.end), counts)


@metric
class ExtractionStrength(_Hits):
    """Extraction strength: how much of the answer's end follows from the shortest sufficient prefix of it.

    A retrained model has more than 0 (easy endings): compare with it. Only an end token that was appended is left out
    (``end=exclude``); plain text, which has none, keeps its last token.
    """

    name: ClassVar[str] = "extraction-strength"
    title: ClassVar[str] = "Extraction strength"
    formula: ClassVar[str] = "1 - k*/T, k* = min{k : hit_t = 1 for all t > k}; mean over records"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)
    paper: ClassVar[Paper] = EXTRACTION
    evaluate = staticmethod(extraction_strength)


@metric
class ExactMemorisation(_Hits):
    """Exact memorisation: how many tokens of the answer are the model's first choice under teacher forcing.

    Tokens that any model of the language would guess count as well: compare with a retrained model.
    """

    name: ClassVar[str] = "exact-memorisation"
    title: ClassVar[str] = "Exact memorisation"
    formula: ClassVar[str] = "(1/T) sum_t [argmax_v p(v | x, y_<t) = y_t]; mean over records"
    direction: ClassVar[Direction] = Direction.FORGET_DOWN
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)
    paper: ClassVar[Paper] = EXACT
    evaluate = staticmethod(exact_memorisation)
