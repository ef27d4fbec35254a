"""What a metric is, the registry of metrics, and one call to evaluate any of them on given logits, labels or strings."""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from expunge.audit.evidence import Evidence, Values
from expunge.core.access import Offer
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


#: What is to be had of answers in words, and of the data: a metric that reads nothing else reads no log-probability.
OF_TEXT = frozenset({Need.GENERATION, Need.RETAIN, Need.HOLDOUT, Need.RETRAINED})


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
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT})  #: what it needs of a modality; the others leave it out
    on_request: ClassVar[bool] = False  #: whether an audit computes it only if it is named: it needs records of a special form

    def visit(self, evidence: Evidence, label: str) -> None:
        """Gather, while the model is in memory, what goes beyond the scores and answers that :attr:`needs` names."""

    def others(self, evidence: Evidence, label: str) -> list[str]:
        """The retrained models without the model itself; that there is none is noted as missing."""
        found = evidence.labels("retrained", but=label)
        if not found:
            evidence.miss(f"{self.title} of {label!r} was not measured: it needs another retrained model.")
        return found

    def plain(self, evidence: Evidence, name: str, value: float, note: str) -> Number:
        """A number about a set without an interval of its own."""
        return Number(
            value=value, over="none", n=len(evidence.records(name)), clusters=len(set(evidence.clusters(name))),
            direction=self.direction, range=self.range, note=note,
        ).checked()  # fmt: skip

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
        asked = [name for name in evidence.sets if self.sets is None or name in self.sets]
        lacks = {name: self.lacks(evidence, name) for name in asked}
        common = len(set(lacks.values())) == 1
        for name in asked:
            if lacks[name]:
                where = "" if common else f" on the {name} set"
                evidence.miss(f"{self.title} was not measured{where}: {lacks[name]}.")
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
