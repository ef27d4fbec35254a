"""A classifier of prompts: is this about a target or not."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field

from expunge.core.errors import InputError
from expunge.guards.calibration import Refitted, Scoring, Threshold
from expunge.guards.conversation import Conversation
from expunge.guards.detectors.tuned import Tuning, loaded, tuned
from expunge.guards.encoders import NGrams
from expunge.guards.parts import Hit, Hook, Material, Watcher, detector
from expunge.guards.pieces import pieces
from expunge.guards.target import Target

#: From texts to the probability that each is about a target, ``[n]``.
Model = Callable[[Sequence[str]], NDArray[np.float64]]


@detector
class Classifier(Scoring):
    """Probability that a prompt is about any target, learnt from the targets' questions and from ordinary prompts (ECO, 2024).

    By default a logistic regression on TF-IDF of words and runs of characters, with classes weighed by the inverse of their size.
    With ``model``, a sequence classifier of transformers: fine-tuned as the paper has it (roberta-base there), or, with
    ``tune=false``, taken as it is. It says that a prompt is about a target, never about which.

    The paper takes fixed thresholds (0.99 to 0.9999 by task; give them as ``threshold``) or a conformal one; here the conformal
    one is the default. Its TOFU classifier is trained on the very questions that it is judged by; here prompts that set the
    threshold are not learnt from, and paraphrases of the questions are the thing to judge by.

    A target that comes or goes is learnt by a new fit, and requests go by the old one until it is done: at once for the
    regression, minutes for a fine-tuned model. The regression holds the questions as hashed n-grams; to fine-tune again, the
    questions are kept in clear. Both are a membership oracle of the targets: who may ask often can find out what it was taught.
    """

    name: ClassVar[str] = "classifier"
    title: ClassVar[str] = "Classifier of prompts"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST})
    least: ClassVar[int] = 2

    model: str = Field("", description="folder or name of a transformers model; none: logistic regression on n-grams")
    tune: bool = Field(True, description="fine-tune the model; else it is a classifier already, whose last label is 'a target'")
    tuning: Tuning = Field(Tuning(), description="how it is fine-tuned")
    penalty: float = Field(10.0, gt=0, description="inverse strength of the regression's penalty (scikit-learn's C)")
    sentences: bool = Field(False, description="also classify each sentence of a turn on its own")

    def fit(self, material: Material) -> Watcher:
        """Learn, and set the threshold.

        Raises:
            InputError: there are too few ordinary prompts, some are questions of a target, or there is no such model.
        """
        learning, calibrating = self.parted(material)
        device = "cpu" if material.adapter is None else str(next(material.adapter.model.parameters()).device)
        learner: Learner
        if self.model and not self.tune:
            return LoadedWatcher(self, loaded(self.model, device), calibrating)
        if self.model:
            learner = FineTuned(self, learning, material.seed, device)
        else:
            learner = Regression(self, learning, material.key, material.seed)
        return ClassifierWatcher(self, learner, material.targets, calibrating)


class Learner(abc.ABC):
    """Learns what tells questions of targets from ordinary prompts."""

    @abc.abstractmethod
    def hold(self, targets: Sequence[Target]) -> None:
        """Hold the questions of targets, in place of those that are held of them."""

    @abc.abstractmethod
    def forget(self, target: str) -> None:
        """Hold them no more."""

    @abc.abstractmethod
    def fitted(self) -> Model | None:
        """A model of what is held; none without any question."""


class Regression(Learner):
    """Logistic regression on hashed n-grams.

    Args:
        settings: of the detector.
        learning: ordinary prompts.
        key: of the guard.
        seed: of the solver.
    """

    def __init__(self, settings: Classifier, learning: Sequence[str], key: bytes, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.encoder = NGrams(key, learning)
        self._ordinary = self.encoder.encode(learning)
        self._held: dict[str, sp.csr_matrix] = {}

    def hold(self, targets: Sequence[Target]) -> None:
        """See the class."""
        for target in targets:
            self._held.pop(target.id, None)
            if target.questions:
                self._held[target.id] = self.encoder.encode(target.questions)

    def forget(self, target: str) -> None:
        """See the class."""
        self._held.pop(target, None)

    def fitted(self) -> Model | None:
        """See the class."""
        if not self._held:
            return None
        from sklearn.linear_model import LogisticRegression

        asked = sp.vstack(list(self._held.values()))
        rows = sp.vstack([asked, self._ordinary]).tocsr()
        labels = np.repeat([1, 0], [asked.shape[0], self._ordinary.shape[0]])
        solver = LogisticRegression(C=self.settings.penalty, class_weight="balanced", max_iter=1000, random_state=self.seed)
        solver.fit(rows, labels)
        return lambda texts: np.asarray(solver.predict_proba(self.encoder.encode(texts))[:, 1])


class FineTuned(Learner):
    """A transformers model that is fine-tuned.

    Args:
        settings: of the detector.
        learning: ordinary prompts.
        seed: of the fine-tuning.
        device: where it runs.
    """

    def __init__(self, settings: Classifier, learning: Sequence[str], seed: int, device: str) -> None:
        self.settings, self.learning, self.seed, self.device = settings, list(learning), seed, device
        self._held: dict[str, list[str]] = {}

    def hold(self, targets: Sequence[Target]) -> None:
        """See the class."""
        for target in targets:
            self._held.pop(target.id, None)
            if target.questions:
                self._held[target.id] = target.questions

    def forget(self, target: str) -> None:
        """See the class."""
        self._held.pop(target, None)

    def fitted(self) -> Model | None:
        """See the class."""
        asked = [q for held in self._held.values() for q in held]
        if not asked:
            return None
        return tuned(self.settings.model, asked, self.learning, self.settings.tuning, seed=self.seed, device=self.device)


class ClassifierWatcher(Refitted[Model]):
    """Classifies conversations; what it learnt and its threshold are exchanged together.

    Args:
        settings: of the detector.
        learner: empty.
        targets: to be learnt.
        calibrating: ordinary prompts that set the threshold.
    """

    def __init__(self, settings: Classifier, learner: Learner, targets: Sequence[Target], calibrating: Sequence[str]) -> None:
        super().__init__()
        self.settings, self.learner = settings, learner
        self._calibrating = [pieces(Conversation.of(t), sentences=settings.sentences) for t in calibrating]
        self.take(targets)

    def _hold(self, targets: Sequence[Target]) -> None:
        self.learner.hold(targets)

    def _forget(self, target: str) -> None:
        self.learner.forget(target)

    def _fitted(self) -> tuple[Model, Threshold] | None:
        model = self.learner.fitted()
        return None if model is None else (model, self.settings.bound(worst(model, self._calibrating)))

    def request(self, conversation: Conversation) -> list[Hit]:
        """One hit, of no target in particular, if one of its pieces is classified as a target's."""
        held = self._held
        return [] if held is None else judged(held[0], held[1], pieces(conversation, sentences=self.settings.sentences))


class LoadedWatcher(Watcher):
    """Classifies by a model that was trained elsewhere: it knows its targets, and no others.

    Args:
        settings: of the detector.
        model: the classifier.
        calibrating: ordinary prompts that set the threshold.
    """

    def __init__(self, settings: Classifier, model: Model, calibrating: Sequence[str]) -> None:
        self.settings, self.model = settings, model
        self.bound = settings.bound(worst(model, [pieces(Conversation.of(t), sentences=settings.sentences) for t in calibrating]))

    def add(self, target: Target) -> None:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError("A classifier that was trained elsewhere cannot learn another target.", "Use it with tune=true.")

    def drop(self, target: str) -> None:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError("A classifier that was trained elsewhere cannot forget a target.", "Use it with tune=true.")

    def request(self, conversation: Conversation) -> list[Hit]:
        """See :class:`ClassifierWatcher`."""
        return judged(self.model, self.bound, pieces(conversation, sentences=self.settings.sentences))


def worst(model: Model, read: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Of each conversation, as pieces, the highest probability of a piece."""
    if not read:
        return np.empty(0)
    found = model([p for held in read for p in held])
    starts = np.cumsum([0, *map(len, read)])[:-1]
    return np.asarray(np.maximum.reduceat(found, starts))


def judged(model: Model, bound: Threshold, read: Sequence[str]) -> list[Hit]:
    """A hit if the probability of a piece is above the threshold."""
    score = float(model(read).max()) if read else 0.0
    return [Hit("", score)] if bound.passed(score) else []
