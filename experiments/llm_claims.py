"""What papers claim in direction, and what the runs say: held, not held, or cannot be told here.

Every claim names two groups of values, and which side should be the larger one. It is *held* if every value of the first group
beats every value of the second, *not held* if none beats any (equal values beat nothing), and *cannot be told here* in all other
cases, or where a group has fewer than three values. With three seeds against three, one order of twenty is "held" by chance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from experiments.lines import Line
from expunge.engine.parts import Paper
from expunge.methods.catalogue import find

Outcome = Literal["held", "not held", "cannot be told here"]
LEAST = 3  #: values of each group
LEVEL = 0.05  #: of the rank test between groups of methods
SECONDS = 10.0  #: what "in seconds" means
#: Methods that teach another answer, turn states away or correct scores, and leave what is known where it is.
SUPPRESSION = ("idk-nll", "idkdpo", "dpo", "altpo", "tru", "rmu", "kuda", "whp", "whp-logits", "uld")
HIDDEN = 0.5  #: share of the target's level, before relearning, below which a run counts as having forgotten or hidden
AT = 0.2  #: forget probability at which courses are compared at equal forgetting

Courses = Mapping[str, Sequence[Mapping[str, Any]]]  #: by name, what each seed left


@dataclass(frozen=True)
class Claim:
    """One claim and what the runs say.

    Attributes:
        claim: what is claimed.
        method: whose paper it is.
        setting: what is compared here, and by what.
        outcome: see the top of this module.
        numbers: what the outcome rests on.
    """

    claim: str
    method: str
    setting: str
    outcome: Outcome
    numbers: str

    @property
    def paper(self) -> Paper:
        """Where it is claimed."""
        paper: Paper = find(self.method).paper
        return paper


def told(first: Sequence[float], second: Sequence[float], larger: bool) -> Outcome:
    """Whether all of ``first`` beat all of ``second``, none beats any, or neither; values that are not known tell nothing."""
    a, b = [[x for x in held if not math.isnan(x)] for held in (first, second)]
    if len(a) < LEAST or len(b) < LEAST:
        return "cannot be told here"
    wins = [x > y if larger else x < y for x in a for y in b]
    return "held" if all(wins) else "cannot be told here" if any(wins) else "not held"


def told_by_rank(first: Sequence[float], second: Sequence[float]) -> tuple[Outcome, float]:
    """Whether the values of ``first`` are the larger ones, by one-sided rank tests (Mann-Whitney); with the p-value."""
    from scipy.stats import mannwhitneyu

    if len(first) < LEAST or len(second) < LEAST:
        return "cannot be told here", math.nan
    p = float(mannwhitneyu(first, second, alternative="greater").pvalue)
    other = float(mannwhitneyu(first, second, alternative="less").pvalue)
    return ("held" if p < LEVEL else "not held" if other < LEVEL else "cannot be told here"), p


# ---- courses over steps


def over_steps(course: Mapping[str, Any], key: str) -> float:
    """Mean of a quantity over the steps of a course, by trapezoids between its looks."""
    x, y = np.array([[look["step"], look[key]] for look in course["looks"]]).T
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def when(course: Mapping[str, Any], key: str, at: float = AT) -> float:
    """A quantity where the forget probability first falls to ``at``, linear between looks; NaN if it never does."""
    looks = course["looks"]
    for before, after in itertools.pairwise(looks):
        p, q = before["forget.probability"], after["forget.probability"]
        if p > at >= q:
            return float(before[key] + (after[key] - before[key]) * (p - at) / (p - q))
    return math.nan


def broken(course: Mapping[str, Any]) -> float:
    """Share of answers to kept prompts that are no language at the last look."""
    return float(course["answers"]["retain"]["degenerate"])


def claims(lines: Mapping[str, Line], courses: Courses) -> list[Claim]:
    """All claims, in the order of the table.

    Args:
        lines: of the main table, by method.
        courses: what the runs over steps left, by name.
    """
    return [*_over_steps(courses), *_by_runs(lines), _relearning(lines)]


def _over_steps(courses: Courses) -> list[Claim]:
    kept = "retain.probability"
    mean: Callable[[Mapping[str, Any]], float] = lambda c: over_steps(c, kept)  # noqa: E731
    equal: Callable[[Mapping[str, Any]], float] = lambda c: when(c, kept)  # noqa: E731
    steps = "mean probability of kept answers over the steps"
    level = f"probability of kept answers where that of the forgotten ones falls to {AT:g}"
    words = "share of answers to kept questions that are no language, at the last step"
    asked: list[tuple[str, str, str, str, str, Callable[[Mapping[str, Any]], float], bool]] = [
        ("NPO degrades slower than gradient ascent as steps go on", "npo", "npo", "ascent", steps, mean, True),
        ("NPO costs less than gradient ascent at equal forgetting", "npo", "npo", "ascent", level, equal, True),
        ("The inverted hinge keeps fluency where ascent loses it", "loku", "ihl", "ascent", words, broken, False),
        ("The same with a likelihood on the retain set", "loku", "ihl + nll", "ascent + nll", words, broken, False),
        ("GU improves its host: gradient difference", "gu", "graddiff + gu", "graddiff", level, equal, True),
        ("GU improves its host: NPO with KL", "gu", "npo-kl + gu", "npo-kl", level, equal, True),
        ("FLAT without retain data keeps more than gradient ascent", "flat", "flat", "ascent", level, equal, True),
    ]
    found = []
    for claim, method, first, second, what, of, larger in asked:
        a, b = ([of(c) for c in courses.get(name, ())] for name in (first, second))
        setting = f"`{first}` beside `{second}`, fixed schedule: {what}"
        found.append(Claim(claim, method, setting, told(a, b, larger), _numbers(first, a, second, b, larger)))
    return found


def _by_runs(lines: Mapping[str, Line]) -> list[Claim]:
    asked = [
        ("SimNPO forgets better than NPO", "simnpo", "simnpo", "npo", "distance", False),
        (
            "WGA, with a retain term, beats gradient ascent, without",
            "wga",
            "wga",
            "gradascent",
            "distance",
            False,
        ),
        ("WGA is a better trade-off than gradient difference", "wga", "wga", "graddiff", "distance", False),
        ("SSU has less collateral damage than task-vector negation", "ssu", "ssu", "task-vector", "model-utility", True),
    ]
    names = {"distance": "distance to the gold standard", "model-utility": "model utility"}
    found = []
    for claim, method, first, second, key, larger in asked:
        a, b = (list(lines[name].values.get(key, ())) if name in lines else [] for name in (first, second))
        setting = f"`{first}` beside `{second}`, runs of the main table: {names[key]}"
        found.append(Claim(claim, method, setting, told(a, b, larger), _numbers(first, a, second, b, larger)))
    took = list(lines["rocr"].values.get("seconds", ())) if "rocr" in lines else []
    outcome: Outcome = "cannot be told here" if len(took) < LEAST else "held" if max(took) < SECONDS else "not held"
    setting = f"`rocr`, runs of the main table: seconds, below {SECONDS:g} in all"
    found.append(Claim("ROCR edits within seconds", "rocr", setting, outcome, _values("rocr", took)))
    return found


def _relearning(lines: Mapping[str, Line]) -> Claim:
    """Groups of methods: of each that has forgotten or hidden at least half, the mean gain under relearning."""
    gains: dict[bool, list[float]] = {True: [], False: []}
    names: dict[bool, list[str]] = {True: [], False: []}
    for name, line in lines.items():
        start, gain = line.mean("relearn.start"), line.mean("relearn.gain")
        if name not in ("retrained", "target") and start <= HIDDEN and not math.isnan(gain):
            gains[name in SUPPRESSION].append(gain)
            names[name in SUPPRESSION].append(name)
    outcome, p = told_by_rank(gains[True], gains[False])
    setting = (
        f"gain under relearning (area less share before it) of methods that are at {HIDDEN:g} of the target's level or below "
        f"before it: {', '.join(names[True]) or 'none'} beside {', '.join(names[False]) or 'none'}; rank test over methods"
    )
    told_of = [f"median {np.median(g):.2f} of {len(g)}" if g else "none" for g in (gains[True], gains[False])]
    numbers = f"{told_of[0]} beside {told_of[1]}" + ("" if math.isnan(p) else f", p = {p:.2g}")
    return Claim("Methods that suppress give more back under relearning than the others", "rmu", setting, outcome, numbers)


def _numbers(first: str, a: Sequence[float], second: str, b: Sequence[float], larger: bool) -> str:
    """All values, in the order of seeds, and how many seeds of the first beat the same seed of the second."""
    pairs = [(x, y) for x, y in zip(a, b, strict=False) if not math.isnan(x) and not math.isnan(y)]
    wins = sum(x > y if larger else x < y for x, y in pairs)
    return f"{_values(first, a)}; {_values(second, b)}" + (f"; seed by seed {wins} of {len(pairs)}" if pairs else "")


def _values(name: str, values: Sequence[float]) -> str:
    return f"{name} " + (", ".join("-" if math.isnan(v) else f"{v:.3f}" for v in values) or "no run")
