"""What a published benchmark is: its data, how its models are made and what is measured, declared.

A benchmark is one file in this package, or an entry point of the group ``expunge.benchmarks`` of another package. It says

- which *sets* of records it has and where they lie (:class:`Source`; the loaders are named data sets of
  :mod:`expunge.data.sets`, which check every row against the published schema);
- how its target is *trained* (:class:`Training`) and what plays the model that never saw the forget set
  (:attr:`Benchmark.reference`);
- what is to be forgotten and kept (:class:`Roles`), with the published settings of unlearning;
- which *axes* are reported: a registered metric with its published options on named sets (:class:`Axis`);
- which rows no method could give (:class:`Yardstick`);
- which of these are followed over several requests (:class:`Course`), and by which rule a checkpoint is chosen (:class:`Oracle`).

Everything that runs is elsewhere: :mod:`expunge.benchmarks.run` joins the stages of the pipeline, and the command line is
``expunge benchmark``. A declaration is complete when ``tests/benchmarks/test_contract.py`` passes for it.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from expunge.core.errors import InputError, unknown
from expunge.core.registry import Registry, origin_of
from expunge.core.results import Direction
from expunge.core.settings import Settings
from expunge.engine.parts import Paper

Modality = Literal["language"]


@dataclass(frozen=True)
class Source:
    """One set of records of a benchmark.

    Attributes:
        reference: what :func:`expunge.data.sources.load` reads: a named data set with its options, or a file.
        text: what it is, in one line.
        rows: how many records the published one has; none: it is not fixed.
        optional: whether the benchmark goes on without it; the axes that read it are then left out, and said to be.
        hazardous: whether its text must never be shown: reports give its hash only.
    """

    reference: str
    text: str
    rows: int | None = None
    optional: bool = False
    hazardous: bool = False


@dataclass(frozen=True)
class Training:
    """One step on the way to the target: a training on named sets, from the base or from the step before.

    Attributes:
        name: of the step, and of its run folder ("target", "clean", "corrupted").
        sets: names of the sets that it trains on, in order.
        parts: published settings, as ``expunge train`` takes them (``{"schedule": {"name": "fixed", "lr": 1e-5}}``).
        base: the published base model, for the reader.
        text: how text becomes tokens (``{"max_length": 2048}``).
    """

    name: str
    sets: tuple[str, ...]
    parts: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    text: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Roles:
    """Which sets a request is made of: what to forget, what is kept while it is, what no model was trained on.

    ``audit`` adds sets to the audit that gives the verdict, by role: ``forget`` and ``retain`` in another shape (questions for
    passages), and further utility sets by any name. ``without`` names further sets that a retrained model must not have seen:
    what is to be forgotten in other forms.
    """

    forget: str
    retain: str | None = None
    holdout: str | None = None
    audit: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Axis:
    """One number that the benchmark reports of every model.

    Attributes:
        name: key of the number in ``benchmark.json`` ("forget-quality").
        title: for people.
        metric: a registered metric.
        sets: role to name of a set: under which role (``forget``, ``retain``, ``holdout``, or any other name for a utility set)
            the metric sees which set of the benchmark.
        number: which of the metric's numbers is meant ("forget.rouge-l-recall", "privleak.min-k", "forget-quality").
        options: published settings of the metric.
        direction: which way is better here; none: as the metric says.
        scale: the number is multiplied by it (100 where the paper prints percentages).
        group: under which heading it is printed ("C1 verbatim memorisation").
        note: what a reader must know of it.
    """

    name: str
    title: str
    metric: str
    sets: Mapping[str, str]
    number: str
    options: Mapping[str, Any] = field(default_factory=dict)
    direction: Direction | None = None
    scale: float = 1.0
    group: str = ""
    note: str = ""


@dataclass(frozen=True)
class Course:
    """Axes followed over several forget sets.

    Attributes:
        name: "scalability", "sustainability".
        kind: ``nested``: each forget set contains the one before, and each is unlearned from the target; ``sequence``: they are
            disjoint requests, each unlearned from the model that the last one left; ``each``: they have no order, each is
            unlearned from the target, and the axes are shown as a table with a row for each.
        sets: names of the forget sets, in order.
        axes: names of the axes to follow.
        text: what it shows.
        labels: of the sets, for people (``each`` only); none: their names.
        options: of the benchmark, under which the model of each set is measured (``each`` only); none: as they are.
    """

    name: str
    kind: Literal["nested", "sequence", "each"]
    sets: tuple[str, ...]
    axes: tuple[str, ...]
    text: str = ""
    labels: tuple[str, ...] = ()
    options: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Oracle:
    """A checkpoint rule that reads a test metric: the first value of a setting at which an axis is down to the reference's value.

    It chooses on what it is judged by, so what it chooses is called *oracle* wherever it is shown.

    Attributes:
        axis: name of the axis.
        values: setting to the values that are tried, in order, for methods that have the setting; the first that fits is taken.
    """

    axis: str
    values: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Profile:
    """Axes that are one number at several levels (copies in the corpus), drawn as a curve with a line for each model.

    Attributes:
        name: of the curve.
        title, x_label: for people.
        at: the levels.
        axes: names of the axes, one for each level.
    """

    name: str
    title: str
    x_label: str
    at: tuple[float, ...]
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Yardstick:
    """A row that no method could give, because it reads what a request does not have; it is called *oracle* wherever it is shown.

    Attributes:
        name: of the row ("rewind").
        weights: the step of the training whose model it is; empty: a training of its own.
        sets: what the target is trained on further, if it is a training.
        parts: settings of that training.
    """

    name: str
    weights: str = ""
    sets: tuple[str, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As it is printed."""
        return f"{self.name} (oracle)"


class Benchmark(Settings, abc.ABC):
    """A published protocol; its fields are its options, and everything else is declared.

    The methods below only name things: none reads a file but :meth:`sample`, which writes one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[Paper]
    licence: ClassVar[str]  #: of the data, and what of it may not be passed on
    home: ClassVar[str]  #: where the data are to be had: hub data set or repository
    modality: ClassVar[Modality] = "language"
    reference: ClassVar[str] = "retrained"
    """What the unlearned model is compared with: models ``retrained`` without the forget set, the model of a named step of
    :meth:`trainings` (such as a clean one, before the corruption), or ``none``."""
    caveats: ClassVar[tuple[str, ...]] = ()  #: what a reader of its numbers must know

    data: str = Field("", description="folder that holds the benchmark's files; none: EXPUNGE_DATA, then the hub")

    @abc.abstractmethod
    def sources(self) -> Mapping[str, Source]:
        """The sets by name, in order."""

    @abc.abstractmethod
    def axes(self) -> Sequence[Axis]:
        """The numbers that are reported, in the order in which they are printed."""

    def trainings(self) -> Sequence[Training]:
        """How the target is made, step by step from the base; none where a pretrained model is the target."""
        return ()

    def learnt(self) -> Sequence[str]:
        """The sets that a model from random weights is trained on, where :meth:`trainings` declares none; all by default."""
        return tuple(self.sources())

    def roles(self) -> Roles | None:
        """The request; none where nothing is unlearned here (a benchmark of general ability)."""
        return None

    def unlearning(self) -> Mapping[str, Any]:
        """The published settings of unlearning, as ``expunge unlearn`` takes them (parts and their parameters)."""
        return {}

    def courses(self) -> Sequence[Course]:
        """Axes over several requests."""
        return ()

    def profiles(self) -> Sequence[Profile]:
        """Axes that are shown as curves."""
        return ()

    def yardsticks(self) -> Sequence[Yardstick]:
        """Rows beside the methods that show what the numbers can reach; they follow from the steps of the training."""
        return ()

    def oracle(self) -> Oracle | None:
        """The published rule for choosing a checkpoint, where it reads a test metric."""
        return None

    @abc.abstractmethod
    def sample(self, folder: Path, seed: int = 0) -> None:
        """Write a small generated data set in exactly the published layout and schema, to be read with ``data=FOLDER``.

        It serves ``--smoke`` and the tests: a tiny model must be able to learn it in seconds.
        """

    def small(self) -> Mapping[str, Any]:
        """Options that make the benchmark fit its own :meth:`sample` (fewer solved questions, shorter pieces)."""
        return {}

    def axis(self, name: str) -> Axis:
        """The axis called ``name``.

        Raises:
            InputError: there is none.
        """
        found = {a.name: a for a in self.axes()}
        if name not in found:
            raise unknown(f"{self.name} axis", name, found)
        return found[name]


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark", "expunge.benchmarks", "expunge.benchmarks")
"""All benchmarks."""


def benchmark(cls: type[Benchmark]) -> type[Benchmark]:
    """Class decorator: register a benchmark under its ``name``."""
    return BENCHMARKS.add(cls.name, cls, origin_of(cls.__module__))


def where(folder: str, **options: Any) -> str:
    """The query of a reference to a named data set: ``?folder=...&option=value``; options that are empty are left out.

    Raises:
        InputError: the folder's name holds a character that a reference cannot.
    """
    if any(c.isspace() or c in "?&" for c in folder):
        raise InputError(f"The folder {folder!r} has a space, '?' or '&' in its name.", "Rename it, or give a link to it.")
    given = {"folder": folder, **options}
    pairs = [f"{key}={value}" for key, value in given.items() if value is not None and value != ""]
    return "?" + "&".join(pairs) if pairs else ""
