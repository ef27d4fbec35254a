"""TOFU's forget quality: can the truth ratios of the model be told from those of a retrained one?"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import TOFU
from expunge.audit.metrics.registry import Metric, Need, Range, metric
from expunge.audit.metrics.truth_ratio import Mean, TruthRatio
from expunge.audit.scores import End, Floats
from expunge.core.results import Direction, Number
from expunge.core.statistics import KSResult, bootstrap, ks
from expunge.engine.parts import Paper

SHIFTS = (0.3, 0.5)  #: in standard deviations of log truth ratios: what a reader should know whether the test would find
FEW = 100  #: below this many records the test passes models that are shifted by half a standard deviation


def forget_quality(ratios: ArrayLike, ratios_retrained: ArrayLike) -> KSResult:
    """Two-sample Kolmogorov-Smirnov test between truth ratios of a model and of a retrained one (TOFU, section 2.2.2).

    The test is invariant under monotone maps, so R, 1/R and log R give the same (give log R where R under- or overflows).
    A high p-value is a failure to find a difference: it rewards small samples.

    Args:
        ratios: truth ratios of the model on the forget set ``[n]``, not the ``min(R, 1/R)`` scores.
        ratios_retrained: of the retrained model ``[m]``.

    Raises:
        InputError: a sample is empty.
    """
    return ks(ratios, ratios_retrained)


def power(ratios: ArrayLike, shift: float, *, noise: float = 0.2, alpha: float = 0.05, draws: int = 200, seed: int = 0) -> float:
    """How often the test finds a model whose log truth ratios are shifted, in [0, 1], by simulation.

    Both models answer the same questions, so a ratio is what the question makes of it, plus noise of the model's own: with the
    given ratios x of standard deviation s, the two samples are ``x + noise s e`` and ``x + shift s + noise s e'`` with
    independent normal e. Because the questions are shared, the test is far weaker than its tables say; without a shift it is
    passed nearly always.

    Args:
        ratios: log truth ratios of a retrained model ``[n]``, finite.
        shift: of the other model, in standard deviations over the questions.
        noise: of each model, in the same unit.
        alpha: p-value below which a difference is said to be found.
        draws: simulated pairs of models.
        seed: of the noise.
    """
    x = np.asarray(ratios, dtype=np.float64)
    rng, spread = np.random.default_rng(seed), float(x.std())
    if not spread > 0:
        return 0.0
    found = 0
    for _ in range(draws):
        own, other = (x + noise * spread * rng.standard_normal(len(x)) for _ in range(2))
        found += ks(own, other + shift * spread).pvalue < alpha
    return found / draws


def log10_floor(n: int) -> float:
    """log10 of the smallest p-value that two samples of ``n`` can give, ``2 / C(2n, n)``: "completely separated", either way."""
    return (math.log(2) - (math.lgamma(2 * n + 1) - 2 * math.lgamma(n + 1))) / math.log(10)


@metric
class ForgetQuality(Metric):
    """TOFU's forget quality with what is needed to read it: the distance D, the number of records, log10 p, floor and power.

    With several retrained models the numbers are those against the one of median p, and the note gives the range. A
    retrained model is compared with the other ones. A p-value has no interval; that of D is a bootstrap over clusters, and is
    biased upwards as all bootstrapped distances are.
    """

    name: ClassVar[str] = "forget-quality"
    title: ClassVar[str] = "Forget quality"
    formula: ClassVar[str] = "p-value of the two-sample KS test between truth ratios R of the model and of a retrained model"
    direction: ClassVar[Direction] = Direction.REFERENCE
    range: ClassVar[Range] = (0.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.PARAPHRASE, Need.PERTURBED, Need.RETRAINED)
    paper: ClassVar[Paper] = TOFU
    evaluate = staticmethod(forget_quality)

    mean: Mean = Field("geometric", description="mean of the truth ratio")
    end: End = Field("include", description="whether the appended end token counts")

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """``forget-quality`` (p), ``forget-quality.d`` and ``forget-quality.log10-p``."""
        ratio = TruthRatio(mean=self.mean, end=self.end)
        lack = ratio.lacks(evidence, "forget")
        others = evidence.labels("retrained", but=label)
        if lack or not others:
            evidence.miss(f"Forget quality was not measured for {label!r}: {lack or 'it needs another retrained model'}.")
            return {}
        own = ratio.log_ratios(evidence, label, "forget")
        present = own.present
        if not present.any():
            evidence.miss("Forget quality was not measured: no forget record has both a paraphrase and perturbed answers.")
            return {}
        against = {o: ratio.log_ratios(evidence, o, "forget").values[present] for o in others}
        tests = {o: ks(own.values[present], values) for o, values in against.items()}
        chosen = sorted(tests, key=lambda o: tests[o].log10_pvalue)[(len(tests) - 1) // 2]
        return self._numbers(evidence, own, against[chosen], tests, chosen)

    def _numbers(
        self, evidence: Evidence, own: Values, other: Floats, tests: dict[str, KSResult], chosen: str
    ) -> dict[str, Number]:
        values = own.values[own.present]
        clusters = [c for c, p in zip(evidence.clusters("forget"), own.present, strict=True) if p]
        n, groups, found = len(values), len(set(clusters)), tests[chosen]
        note = f"against {chosen!r}; the floor of log10 p at n = {n} is {log10_floor(n):.1f}; test: {found.method}"
        note += self._power(evidence, chosen, other)
        if len(tests) > 1:
            ps = [t.pvalue for t in tests.values()]
            note += f"; over {len(tests)} retrained models p is {min(ps):.2g} to {max(ps):.2g}"
        flags = (f"too few: {n} records pass models that differ clearly",) if n < FEW else ()
        at = evidence.protocol
        distance = bootstrap((values, other), clusters, _distance, draws=at.draws, level=at.level, seed=at.seed)
        fixed = {"over": "none", "n": n, "clusters": groups, "note": note, "flags": flags}
        p = Number(value=found.pvalue, direction=self.direction, range=self.range, **fixed)
        log10 = Number(value=found.log10_pvalue, direction=Direction.ZERO, range=(None, 0.0), **fixed)
        return {
            self.name: p.checked(),
            f"{self.name}.d": distance.number(Direction.ZERO, (0.0, 1.0), note, flags),
            f"{self.name}.log10-p": log10.checked(),
        }

    def _power(self, evidence: Evidence, chosen: str, ratios: Floats) -> str:
        """What the test can find among so many records."""
        if not np.isfinite(ratios).all():
            return ""
        key = ("ks power", self.model_dump_json(), evidence.subject(chosen).fingerprint, len(ratios))
        found = evidence.memo(key, lambda: [power(ratios, shift, seed=evidence.protocol.seed) for shift in SHIFTS])
        told = " and ".join(f"{p:.0%} of those shifted by {s:g}" for p, s in zip(found, SHIFTS, strict=True))
        return f"; power at n = {len(ratios)}: it finds {told} standard deviations (p < 0.05, simulated)"


def _distance(a: Floats, b: Floats) -> float:
    """The KS distance of two samples."""
    points = np.concatenate([a, b])
    x = np.searchsorted(np.sort(a), points, side="right") / len(a)
    y = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return float(np.max(np.abs(x - y)))
