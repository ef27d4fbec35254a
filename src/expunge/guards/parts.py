"""What a guard is made of: detectors and actions, on five hook points.

======================  ====================================================  ==========================
hook                    what a guard sees there                               what it may do
======================  ====================================================  ==========================
``request``             the whole conversation, before it becomes tokens      answer itself, rewrite, or plan what follows
``embeddings``          embeddings of the prompt's tokens                     change them
``hidden``              a module's input or output                            read it (detector), change it (action)
``scores``              scores of the next token, and the tokens so far       add to them
``text``                the answer, as far as it is known                     stop it, exchange it
======================  ====================================================  ==========================

A detector is fitted on targets and on prompts that must pass, to a :class:`Watcher`; an action becomes a :class:`Doer`. Both are
shared by all requests and hold no state of any: what belongs to one request is in the :class:`Orders` that an action gives for
it.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from expunge.core.errors import InputError
from expunge.core.registry import Registry, origin_of
from expunge.core.settings import Settings
from expunge.data.records import Record
from expunge.guards.conversation import Conversation
from expunge.guards.target import Target

if TYPE_CHECKING:
    from expunge.adapters.language import LanguageAdapter

P = TypeVar("P", bound=Settings)


class Hook(enum.StrEnum):
    """Where a guard may look or act."""

    REQUEST = "request"
    EMBEDDINGS = "embeddings"
    HIDDEN = "hidden"
    SCORES = "scores"
    TEXT = "text"


class Probe(enum.StrEnum):
    """Of what a part reads texts through the model when it is fitted (:attr:`Material.probes`)."""

    SKILL = "skill"  #: what is to be hidden
    KEPT = "kept"  #: what is to stay


#: Hooks at which no model is needed: guards of these alone stand in front of any server.
TEXT_LEVEL = frozenset({Hook.REQUEST, Hook.TEXT})


@dataclass(frozen=True)
class Material:
    """What detectors and actions are fitted on.

    Attributes:
        targets: what is to be hidden.
        ordinary: prompts that must pass: by them thresholds are set. None of them may be judged by later.
        key: secret of the guard; keyed digests and noise follow from it.
        adapter: the model, for guards that look inside; none before a server of others.
        probes: texts by name of a skill; ``""``: texts of what is to stay. A record is read as the model reads it.
        seed: of everything that is drawn at fitting.
        groups: of each ordinary prompt, what it is about; none: each stands for itself. No group is both learnt from and used to
            set a threshold, so that a threshold holds for what nothing was learnt about.
    """

    targets: Sequence[Target]
    ordinary: Sequence[str] = ()
    key: bytes = b""
    adapter: LanguageAdapter | None = None
    probes: Mapping[str, Sequence[str | Record]] = field(default_factory=dict)
    seed: int = 0
    groups: Sequence[str] = ()

    def model(self, what: str) -> LanguageAdapter:
        """The model.

        Raises:
            InputError: there is none.
        """
        if self.adapter is None:
            raise InputError(
                f"{what} looks inside the model, and there is none here.", "Use it with --model, not before another server."
            )
        return self.adapter

    def read(self) -> list[Any]:
        """All texts that guards are fitted on beside the targets, as plain values: for digests."""
        probes = {k: [t if isinstance(t, str) else t.content() for t in v] for k, v in self.probes.items()}
        return [list(self.ordinary), *([probes] if probes else [])]


@dataclass(frozen=True, slots=True)
class Hit:
    """What a detector has noticed.

    Attributes:
        target: id of the target; empty where it is not known which.
        score: how sure, on the detector's own scale.
    """

    target: str
    score: float


@dataclass(frozen=True)
class Reading:
    """Which states a watcher wants to see once, when the prompt has been read.

    Attributes:
        module: dotted name within the transformers model.
        side: the module's ``input`` or ``output``.
        pool: the prompt's ``last`` token, or the ``mean`` of its tokens.
    """

    module: str
    side: Literal["input", "output"] = "output"
    pool: Literal["last", "mean"] = "last"


class Watcher:
    """A fitted detector. Its methods are called from many threads at once; adding and dropping targets may happen meanwhile.

    What :meth:`request` and :meth:`hidden` give follows from what they are shown and from the targets alone: an audit, which asks
    the same prompts many times, shows each once.
    """

    readings: tuple[Reading, ...] = ()

    @property
    def promise(self) -> str:
        """What is promised about ordinary prompts, in a sentence; empty: nothing."""
        return ""

    def covers(self, target: Target) -> bool:
        """Whether a target says anything that this detector can notice."""
        return True

    def add(self, target: Target) -> None:
        """Hide one target more, from now on."""
        raise InputError("This detector cannot take a target in while it runs.", "Fit the guard anew.")

    def drop(self, target: str) -> None:
        """Hide a target no more."""
        raise InputError("This detector cannot give a target up while it runs.", "Fit the guard anew.")

    def request(self, conversation: Conversation) -> list[Hit]:
        """What a conversation is about."""
        return []

    def hidden(self, states: Mapping[Reading, Tensor]) -> list[Hit]:
        """What the states of a prompt tell, ``[D]`` for each of :attr:`readings`."""
        return []

    def answer(self, conversation: Conversation, text: str, start: int, final: bool) -> list[Hit]:
        """What an answer says.

        Args:
            conversation: what it answers.
            text: the answer as far as it is known.
            start: characters of it that were seen and let pass.
            final: whether it goes on no further.
        """
        return []

    def safe(self, text: str, start: int) -> int:
        """How many characters of an answer that goes on nothing that follows can make forbidden, at least ``start``."""
        return len(text)


class Detector(Settings, abc.ABC):
    """Notices that something is about a target."""

    name: ClassVar[str]
    title: ClassVar[str]
    sees: ClassVar[frozenset[Hook]]  #: among request, hidden, text
    probed: ClassVar[frozenset[Probe]] = frozenset()  #: what it reads texts of when it is fitted

    @abc.abstractmethod
    def fit(self, material: Material) -> Watcher:
        """Learn the targets.

        Raises:
            InputError: the material does not hold what it needs.
        """


class EmbeddingEdit(abc.ABC):
    """Changes embeddings of one request's prompt."""

    @abc.abstractmethod
    def marked(self, text: str, spans: Sequence[tuple[int, int]], content: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which tokens are changed, bool ``[T]``.

        Args:
            text: the prompt, as it was put into tokens.
            spans: characters of each token, ``T`` pairs.
            content: which tokens stand for what the turns say (and not for the template), ``[T]``.
        """

    def order(self, count: int) -> NDArray[np.int64] | None:
        """Which of the ``count`` marked tokens' embeddings each of them gets, ``[count]``; none: each its own."""
        return None

    @abc.abstractmethod
    def apply(self, rows: Tensor, places: NDArray[np.int64]) -> Tensor:
        """Other embeddings for some tokens.

        Args:
            rows: embeddings of marked tokens, ``[n, D]``, in their :meth:`order`.
            places: which of the marked tokens they are, ``[n]``: what is drawn for a token must not depend on how the prompt is
                cut.
        """


@dataclass(frozen=True)
class HiddenEdit:
    """Changes states of one request at every token, in the prompt and after.

    Attributes:
        module: dotted name within the transformers model.
        side: the module's ``input`` or ``output``.
        change: from states ``[T, D]`` and the place of the first of them to states of the same shape.
    """

    module: str
    side: Literal["input", "output"]
    change: Callable[[Tensor, int], Tensor]


#: From the ids of a request ``[T]`` (prompt, then answer), the prompt's length and scores ``[V]`` to scores of the same shape.
ScoreEdit = Callable[[Tensor, int, Tensor], Tensor]


class JointEdit(abc.ABC):
    """A :data:`ScoreEdit` to which many rows cost less together than each alone: requests of a batch, beams, tokens of an answer.

    Every row gets what it would get alone: nothing of one request may reach another.

    Attributes:
        shared: edits with the same one are asked together.
    """

    shared: Hashable

    @abc.abstractmethod
    def together(self, rows: Sequence[tuple[Any, Tensor, int, Tensor]]) -> list[Tensor]:
        """Scores of some rows, in their order.

        Args:
            rows: an edit that shares with this one, ids, length of the prompt and scores of each.
        """

    def __call__(self, ids: Tensor, prompt: int, scores: Tensor) -> Tensor:
        """Scores ``[V]`` of one row."""
        return self.together([(self, ids, prompt, scores)])[0]


@dataclass(frozen=True)
class Orders:
    """What is to be done for one request; a part of an action that does nothing is left out.

    Attributes:
        say: the answer, in place of the model's.
        conversation: what the model is asked instead.
        embeddings: of the prompt.
        hidden: states.
        scores: of the next token.
        revise: from the whole answer to another one; nothing is sent before.
    """

    say: str | None = None
    conversation: Conversation | None = None
    embeddings: EmbeddingEdit | None = None
    hidden: tuple[HiddenEdit, ...] = ()
    scores: ScoreEdit | None = None
    revise: Callable[[str], str] | None = None


class Doer(abc.ABC):
    """A prepared action. Called from many threads at once; targets may come and go meanwhile."""

    def covers(self, target: Target) -> bool:
        """Whether something can be done about a target, once it is noticed."""
        return True

    def add(self, target: Target) -> None:  # noqa: B027  (most actions do not name targets)
        """One target more is hidden."""

    def drop(self, target: str) -> None:  # noqa: B027
        """A target is hidden no more."""

    @abc.abstractmethod
    def orders(self, conversation: Conversation, hits: Sequence[Hit]) -> Orders:
        """What to do about one request.

        Args:
            conversation: what is asked, with what rows before this one have rewritten.
            hits: what the detector has noticed.
        """


class Action(Settings, abc.ABC):
    """What is done about it."""

    name: ClassVar[str]
    title: ClassVar[str]
    acts: ClassVar[frozenset[Hook]]
    rewrites: ClassVar[bool] = False  #: whether it puts words before the model that the client has not written
    revises: ClassVar[bool] = False  #: whether it may exchange a whole answer, so that nothing may be sent before
    probed: ClassVar[frozenset[Probe]] = frozenset()  #: what it reads texts of when it is prepared

    @abc.abstractmethod
    def prepare(self, material: Material) -> Doer:
        """Make ready for requests.

        Raises:
            InputError: the material does not hold what it needs.
        """


DETECTORS: Registry[type[Detector]] = Registry("detector", "expunge.guards.detectors", "expunge.detectors")
ACTIONS: Registry[type[Action]] = Registry("action of a guard", "expunge.guards.actions", "expunge.guard_actions")


def detector(cls: type[Detector]) -> type[Detector]:
    """Class decorator: register a detector under its ``name``."""
    return DETECTORS.add(cls.name, cls, origin_of(cls.__module__))


def action(cls: type[Action]) -> type[Action]:
    """Class decorator: register an action under its ``name``."""
    return ACTIONS.add(cls.name, cls, origin_of(cls.__module__))


def part(registry: Registry[type[P]], given: object) -> P:
    """A part from its name, from a mapping with ``name`` and settings, or as it is.

    Raises:
        InputError: there is no such part, or a setting of it is wrong.
    """
    if isinstance(given, str):
        return registry.get(given)()
    if isinstance(given, Mapping):
        rest = dict(given)
        name = rest.pop("name", None)
        if not isinstance(name, str):
            raise InputError(f"A {registry.kind} needs its name.", f"Give one of {', '.join(registry.names())}.")
        return registry.get(name)(**rest)
    if isinstance(given, Settings):
        return given  # type: ignore[return-value]
    raise InputError(f"{given!r} is no {registry.kind}.", "Give its name, or a mapping with its name and settings.")
