"""Named data sets: ``name:configuration?option=value&option=value``.

A named set knows its columns, its subjects and its companions (what to retain, what was held out, what to audit). A new one
is a class in a module of :mod:`expunge.data.sets`, or an entry point of the group ``expunge.datasets`` of another package.
"""

from __future__ import annotations

import abc
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from expunge.core.errors import InputError, unknown
from expunge.core.registry import Registry
from expunge.core.settings import Settings
from expunge.data.records import RecordSet

_REFERENCE = re.compile(r"(?P<name>[A-Za-z0-9_-]{2,}):(?P<rest>[^\s]*)")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Companions:
    """The sets that go with a forget set, as references for :func:`expunge.data.sources.load`.

    Attributes:
        retain: what the request keeps.
        holdout: what no model was trained on.
        train: what the target model is trained on, in this order.
        retrain: what the retrained model is trained on.
        audit: the sets to score, by role: ``forget`` and ``retain`` with paraphrased and perturbed answers, and the two sets
            of general knowledge ``real_authors`` and ``world_facts``; the last three make up TOFU's model utility.
    """

    retain: str
    holdout: str
    train: tuple[str, ...]
    retrain: tuple[str, ...]
    audit: Mapping[str, str] = field(default_factory=dict)


class NamedSet(Settings, abc.ABC):
    """A named data set: its fields are its options, and an instance loads its configurations."""

    @abc.abstractmethod
    def configurations(self) -> dict[str, str]:
        """Each configuration with one line about it."""

    @abc.abstractmethod
    def load(self, configuration: str) -> RecordSet:
        """The records of one configuration, with the configuration's name.

        Raises:
            InputError: the data are not here and cannot be had.
        """

    def companions(self, configuration: str) -> Companions | None:
        """What goes with a forget configuration; ``None`` for a configuration that is no forget set."""
        return None


DATASETS: Registry[type[NamedSet]] = Registry("data set", "expunge.data.sets", "expunge.datasets")
"""All named data sets."""


@dataclass(frozen=True)
class Reference:
    """A parsed reference to a named data set."""

    name: str
    configuration: str
    options: Mapping[str, str]


def is_named(text: str) -> bool:
    """Whether a text reads as a named data set: ``name:...``, or the bare name of one that is registered."""
    if _REFERENCE.fullmatch(text):
        return True
    return bool(_BARE.fullmatch(text)) and text in DATASETS


def parse(text: str) -> Reference:
    """Take ``people:forget?persons=40&seed=1`` apart.

    Raises:
        InputError: there is no such data set or configuration, or an option is not written ``key=value``.
    """
    head, _, query = text.partition("?")
    name, _, configuration = head.partition(":")
    options: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        key, equals, value = pair.partition("=")
        if not key or not equals or key in options:
            raise InputError(
                f"{pair!r} in {text!r} is no option.", f"Write each once, as in {name}:{configuration}?key=value&key=value."
            )
        options[key] = value
    return Reference(name, configuration, options)


def open_named(text: str) -> tuple[NamedSet, str]:
    """The data set with its options, and the configuration, that a reference names.

    Raises:
        InputError: there is no such data set, configuration or option; the message names the nearest.
    """
    reference = parse(text)
    dataset = DATASETS.get(reference.name)(**reference.options)
    known = dataset.configurations()
    if not reference.configuration:
        listed = ", ".join(f"{reference.name}:{c}" for c in known)
        raise InputError(f"{text!r} does not say which part of the data set {reference.name}.", f"Give one of: {listed}.")
    if reference.configuration not in known:
        raise unknown(f"{reference.name} configuration", reference.configuration, known)
    return dataset, reference.configuration


def load_named(text: str) -> RecordSet:
    """Load a named data set; the set's name and source are the reference.

    Raises:
        InputError: it does not exist, or its data are not here and cannot be had.
    """
    dataset, configuration = open_named(text)
    return RecordSet(text, dataset.load(configuration).records, text)


def companions(text: str) -> Companions | None:
    """What goes with a forget set given by reference (retain, holdout, training and audit sets); ``None`` if it has none."""
    if not is_named(text) or Path(text).is_file():
        return None
    dataset, configuration = open_named(text)
    return dataset.companions(configuration)


def data_folder() -> Path | None:
    """The folder of local data sets: the environment variable ``EXPUNGE_DATA``.

    Raises:
        InputError: it is set and is no folder.
    """
    text = os.environ.get("EXPUNGE_DATA", "")
    if not text:
        return None
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise InputError(f"The environment variable EXPUNGE_DATA names {text}, which is no folder.", "Correct it, or unset it.")
    return folder
