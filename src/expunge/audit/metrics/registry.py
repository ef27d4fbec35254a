"""What a metric is, the registry of metrics, and one call to evaluate any of them on given logits, labels or strings."""

from __future__ import annotations

import abc
import enum
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch

from expunge.audit.evidence import Evidence, Values
from expunge.audit.scores import token_statistics
from expunge.core.errors import InputError, MissingExtra, unknown
from expunge.core.registry import Registry, origin_of
from expunge.core.results import Direction, Number
from expunge.core.settings import Settings
from expunge.core.statistics import Interval
from expunge.engine.parts import Paper

Range = tuple[float | None, float | None]


class Need(enum.StrEnum):
    """What a metric reads; an audit gathers it once for all of them."""

    ANSWER = "scores of the answers"
    PARAPHRASE = "scores of paraphrased answers"
    PERTURBED = "scores of perturbed (wrong) answers"
    GENERATION = "greedy continuations of the prompts"
    GRADIENT = "a backward pass per example"
    RETAIN = "a retain set"
    HOLDOUT = "a holdout set that the model was never trained on"
    RETRAINED = "a retrained model"


class Metric(Settings, abc.ABC):
    """A quantity computed from shared evidence; its fields are its parameters.

    A metric is one file: the formula as a pure function on plain arrays or strings, and a class that applies it to the
    evidence. The class attributes below are what ``expunge metrics NAME`` and the documentation print.
    """

    name: ClassVar[str]  #: registered name, and the key of its numbers (``<set>.<name>`` or ``<name>``)
    title: ClassVar[str]
    formula: ClassVar[str]  #: in plain text, with its symbols explained in the docstring
    direction: ClassVar[Direction]  #: on the forget set
    range: ClassVar[Range]
    needs: ClassVar[tuple[Need, ...]]
    paper: ClassVar[Paper]
    evaluate: ClassVar[Callable[..., Any]]  #: the pure function, see :func:`evaluate_metric`

    def visit(self, evidence: Evidence, label: str) -> None:
        """Gather, while the model is in memory, what goes beyond the scores and answers that :attr:`needs` names."""

    @abc.abstractmethod
    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The numbers of one model, keyed as in :class:`~expunge.audit.document.ModelEntry`.

        What cannot be measured is left out and said by :meth:`Evidence.miss`, or is a number without a value whose note
        says why; never 0.
        """


class RecordMetric(Metric):
    """A metric with one value per record, whose number is the mean over the records of a set."""

    sets: ClassVar[tuple[str, ...] | None] = None  #: the sets it is measured on; None: all
    asks: ClassVar[bool] = False  #: whether it has prompts of its own

    @abc.abstractmethod
    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """One value per record of the set ``name``."""

    @abc.abstractmethod
    def lacks(self, evidence: Evidence, name: str) -> str:
        """What a set lacks for this metric to be measured on it, or nothing if it lacks nothing."""

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """Which way is better on a set."""
        return evidence.direction(name)

    def values(self, evidence: Evidence, label: str, name: str) -> Values:
        """:meth:`per_record`, computed once however many metrics and verdicts read it."""
        key = ("values", self.name, self.model_dump_json(), evidence.subject(label).fingerprint, name)
        return evidence.memo(key, lambda: self.per_record(evidence, label, name))

    def visit(self, evidence: Evidence, label: str) -> None:
        """Nothing by default; a metric that asks in its own way computes its values here."""
        if self.asks:
            for name in evidence.sets:
                if (self.sets is None or name in self.sets) and not self.lacks(evidence, name):
                    self.values(evidence, label, name)

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """Mean over the records of each set, with its interval over clusters."""
        out = {}
        for name in evidence.sets:
            if self.sets is not None and name not in self.sets:
                continue
            lack = self.lacks(evidence, name)
            if lack:
                evidence.miss(f"{self.title} was not measured on the {name} set: {lack}.")
                continue
            found, direction = self.values(evidence, label, name), self.direction_on(evidence, name)
            number = mean_number(evidence, name, found, direction, self.range)
            if number is not None:
                out[f"{name}.{self.name}"] = number
        return out


def mean_number(evidence: Evidence, name: str, found: Values, direction: Direction, range: Range) -> Number | None:
    """The mean over present records as a number with its interval, its note says how many are absent; None if all are."""
    if not found.present.any():
        return None
    absent = int((~found.present).sum())
    note = f"{absent} of {len(found.present)} records have no value and are left out" if absent else ""
    return widened(evidence.interval(name, found), range).number(direction, range, note)


def widened(interval: Interval, range: Range) -> Interval:
    """An interval that is not empty where every record sits on the same end of a bounded range.

    Resampling equal values gives an interval of no width, which claims certainty from, say, three persons. "No leak in k
    groups" is a bound, not a zero: with level L the share of groups that would differ is at most ``1 - ((1 - L)/2)^(1/k)``
    (exact binomial), and so is the mean, in units of the range.
    """
    low, high = range
    if low is None or high is None or interval.low is None or interval.low != interval.high:
        return interval
    slack = (high - low) * (1 - ((1 - interval.level) / 2) ** (1 / interval.clusters))
    if interval.value == low:
        return replace(interval, high=low + slack)
    return replace(interval, low=high - slack) if interval.value == high else interval


METRICS: Registry[type[Metric]] = Registry("metric", "expunge.audit.metrics", "expunge.metrics")


def metric(cls: type[Metric]) -> type[Metric]:
    """Class decorator: register a metric under its ``name``."""
    return METRICS.add(cls.name, cls, origin_of(cls.__module__))


def evaluate_metric(name: str, **inputs: Any) -> Any:
    """Evaluate a metric's formula on given inputs, without models or files.

    Every metric and every score-based attack has a pure function, and this calls it: for tests, for teaching, and so that
    anyone can compare Expunge with another implementation number by number. Where the function takes per-token arrays
    (``logp``, ``hits``, ``mean_logp``, ``std_logp``), one answer's ``logits`` ``[T, V]`` and ``labels`` ``[T]`` may be given
    instead; row ``t`` of the logits is the one that predicts label ``t`` (no shift is applied).

    Args:
        name: a registered metric, or a score-based membership attack.
        inputs: the parameters of its function.

    Returns:
        What the function returns; a float for most.

    Raises:
        InputError: no such metric, a parameter that it does not take, or one that is missing; the message names those it takes.
    """
    function = _function(name)
    parameters = inspect.signature(function).parameters
    if "logits" in inputs and "labels" in inputs:
        inputs = _from_logits(inputs, set(parameters))
    for given in inputs:
        if given not in parameters:
            raise unknown(f"{name} parameter", given, parameters)
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in inputs]
    if missing:
        raise InputError(f"Parameter {missing[0]!r} of {name} is missing.", f"It takes {', '.join(parameters)}.")
    return function(**inputs)


def require_rouge() -> None:
    """Check for the package that tokenises and stems for ROUGE.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import rouge_score.tokenize  # noqa: F401
    except ImportError:
        raise MissingExtra("ROUGE", "llm") from None


def _function(name: str) -> Callable[..., Any]:
    from expunge.audit.attacks.membership import MEMBERSHIP

    if name not in METRICS and name in MEMBERSHIP:
        return MEMBERSHIP.get(name).evaluate
    return METRICS.get(name).evaluate


def _from_logits(inputs: dict[str, Any], wanted: set[str]) -> dict[str, Any]:
    rest = {k: v for k, v in inputs.items() if k not in ("logits", "labels")}
    logits, labels = torch.as_tensor(inputs["logits"]), torch.as_tensor(inputs["labels"])
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"Logits must be [T, V] and labels [T]; got {tuple(logits.shape)} and {tuple(labels.shape)}.",
            "Give one answer at a time, with the row that predicts each label.",
        )
    found = token_statistics(logits, labels.long())
    arrays = {"logp": found["logp"], "hits": found["hit"], "mean_logp": found["mean_logp"], "std_logp": found["std_logp"]}
    taken = {k: v.numpy() for k, v in arrays.items() if k in wanted}
    if not taken:
        raise InputError("This metric reads no logits.", f"It takes {', '.join(sorted(wanted))}.")
    return {**taken, **rest}
