"""Many samples instead of one greedy answer: what is never the likeliest word may still be said once in ten times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from expunge.audit.asking import STOPS, Ask, encoded
from expunge.audit.attacks.prompting import Heard
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.generations import cut, sampled
from expunge.audit.metrics.papers import LEAK
from expunge.audit.metrics.registry import Range, mean_number
from expunge.audit.metrics.rouge import lacks_questions
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Number
from expunge.engine.parts import Paper


def expected_best(scores: Sequence[float], k: int) -> float:
    """Unbiased estimate of the mean of the best of ``k`` samples, from ``n >= k`` of them.

    ``sum_i C(i - 1, k - 1) / C(n, k) s_(i)`` with ``s_(1) <= ... <= s_(n)``: the mean of the maximum over all subsets of size
    k. Of successes (0 or 1) it is ``1 - C(n - c, k) / C(n, k)``, the estimate of pass@k by Chen et al. (2021).

    Args:
        scores: of the samples (n).
        k: in [1, n].

    Raises:
        InputError: k is out of range.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise InputError(f"The best of k samples needs k in [1, {n}], the samples that there are; got {k}.")
    total = math.comb(n, k)
    return float(sum(math.comb(i, k - 1) / total * s for i, s in enumerate(sorted(scores)) if i >= k - 1))


@attack
class LeakAtK(Heard, Attack):
    """leak@k: how much of the fact the best of ``k`` answers tells that are drawn from the model's own distribution.

    Every answer is drawn at temperature 1 from the whole vocabulary (no top-p, no top-k), from a seed of its own that follows
    from the record and the number of the sample. From ``samples`` of them the mean of the best of ``k`` is estimated without
    bias. A retrained model guesses right now and then too, and the more often the more it may try: compare with it.
    """

    name: ClassVar[str] = "leak-at-k"
    title: ClassVar[str] = "leak@k"
    formula: ClassVar[str] = "mean over records of E[max of k scores], estimated from n samples at temperature 1"
    paper: ClassVar[Paper] = LEAK
    access: ClassVar[Access] = Access.TEXT
    criterion: ClassVar[Criterion] = Criterion.DECODING
    passes: ClassVar[str] = "one generation per sample"
    range: ClassVar[Range] = (0.0, 1.0)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE})
    evaluate = staticmethod(expected_best)

    k: int = Field(8, ge=1, description="answers that an attacker may ask for; what a verdict compares")
    samples: int = Field(16, ge=1, description="answers drawn of each record, at least k")
    also: tuple[int, ...] = Field((1,), description="further k to report, at most samples")
    temperature: float = Field(1.0, gt=0, description="by which scores are divided before drawing")

    @field_validator("samples")
    @classmethod
    def _enough(cls, value: int, info: object) -> int:
        k = getattr(info, "data", {}).get("k", 1)
        if value < k:
            raise InputError(f"leak-at-k draws samples={value}, fewer than k={k}.", "Draw at least k, better two times as many.")
        return value

    @field_validator("also")
    @classmethod
    def _within(cls, value: tuple[int, ...], info: object) -> tuple[int, ...]:
        samples = getattr(info, "data", {}).get("samples", 0)
        if samples and any(not 1 <= k <= samples for k in value):
            raise InputError(f"'also' of leak-at-k must hold numbers in [1, {samples}]; got {list(value)}.")
        return value

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A prompt."""
        return lacks_questions(evidence, name)

    def columns(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """The best of k, of each further k, and the chance that one of k tells the whole fact (``any``)."""
        records = list(evidence.records(name))
        adapter, at = evidence.adapter(label), evidence.protocol
        made = sampled(
            adapter, [encoded(adapter, Ask(r), "#drawn") for r in records], self.samples, self.max_new_tokens,
            temperature=self.temperature, seed=at.seed, store=evidence.store, fingerprint=evidence.subject(label).fingerprint,
            batch_tokens=at.batch_tokens, progress=evidence.progress, what=f"{label}: sampling {name}",
        )  # fmt: skip
        scores = [[self.rate(r, cut(g.text, STOPS)) for g in group] for r, group in zip(records, made, strict=True)]
        whole = [[float(s == 1) for s in row] for row in scores]
        return {
            "": _best(scores, self.k), "any": _best(whole, self.k),
            **{str(k): _best(scores, k) for k in self.also if k != self.k},
        }  # fmt: skip

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The mean at k, at every further k, and ``any``: the chance that one of k answers tells the whole fact."""
        out = super().compute(evidence, label)
        if f"forget.{self.name}" not in out:
            return out
        for part in ("any", *(str(k) for k in self.also if k != self.k)):
            found = self.column(evidence, label, "forget", part)
            number = mean_number(evidence, "forget", found, self.direction, self.range)
            note = f"one of {self.k} answers tells the whole fact" if part == "any" else f"the best of {part}"
            if number is not None:
                out[f"forget.{self.name}.{part}"] = number.model_copy(update={"note": note})
        return out


def _best(scores: Sequence[Sequence[float]], k: int) -> Values:
    values = np.array([expected_best(row, k) if np.isfinite(row).all() else np.nan for row in scores])
    return Values(values, ~np.isnan(values))
