"""Likeness to what a target is asked by: the nearest of its questions and topics."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field

from expunge.guards.calibration import Bounded, Scoring, Threshold
from expunge.guards.conversation import Conversation
from expunge.guards.encoders import Columns, Encoder, encoder_of
from expunge.guards.parts import Hit, Hook, Material, Watcher, detector
from expunge.guards.pieces import pieces
from expunge.guards.target import Target


@detector
class Similar(Scoring):
    """Cosine to the nearest question or topic of a target, above a threshold that ordinary prompts set.

    By default texts are TF-IDF vectors of words and of runs of characters (:mod:`expunge.guards.encoders`), which see the same
    words, not the same meaning; a sentence encoder by folder or name sees paraphrases too. A target is added or dropped at once,
    and all are looked up in one sparse product. The threshold is that of the nearest of all targets: it is set anew when
    one comes or goes, and rises as they get more.

    The vectors are derivatives of questions and of ordinary prompts: personal data where those are. Targets that have neither
    questions nor topics are not seen.
    """

    name: ClassVar[str] = "similar"
    title: ClassVar[str] = "Likeness to a target's questions"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST})

    encoder: str = Field("", description="folder or name of a sentence encoder; none: n-grams")
    sentences: bool = Field(True, description="also look at each sentence of a turn on its own")

    def fit(self, material: Material) -> Watcher:
        """Learn which n-grams are rare, and set the threshold.

        Raises:
            InputError: there are too few ordinary prompts, or some are questions of a target.
        """
        learning, calibrating = self.parted(material)
        device = "cpu" if material.adapter is None else next(material.adapter.model.parameters()).device
        encoder = encoder_of(self.encoder, material.key, learning, device)
        made = SimilarWatcher(self, encoder, calibrating)
        made.take(material.targets)
        return made


@dataclass(frozen=True)
class _Held:
    columns: Columns | None
    starts: NDArray[np.int64]  # first column of each target
    targets: tuple[str, ...]
    bound: Threshold | None


class SimilarWatcher(Bounded):
    """Looks up the nearest question. A request sees all of a change of targets, or nothing of it.

    Args:
        settings: of the detector.
        encoder: fitted.
        calibrating: ordinary prompts that set the threshold.
    """

    def __init__(self, settings: Similar, encoder: Encoder, calibrating: Sequence[str]) -> None:
        self.settings, self.encoder = settings, encoder
        read = [pieces(Conversation.of(t), sentences=settings.sentences) for t in calibrating]
        self._calibrating = encoder.encode([p for held in read for p in held])
        self._starts = np.cumsum([0, *[len(held) for held in read[:-1]]])
        self._count = len(read)
        self._rows: dict[str, sp.csr_matrix] = {}
        self._scores: dict[str, NDArray[np.float64]] = {}
        self._lock = threading.Lock()
        self._held = self._built()

    @property
    def bound(self) -> Threshold | None:
        """The threshold as it is now; none without targets."""
        return self._held.bound

    def take(self, targets: Sequence[Target]) -> None:
        """Hold targets, in place of what is held of them."""
        asked = [(t, t.questions) for t in targets]
        made = self.encoder.encode([q for _, questions in asked for q in questions])
        with self._lock:
            at = 0
            for target, questions in asked:
                self._forget(target.id)
                if questions:
                    rows = made[at : at + len(questions)]
                    self._rows[target.id] = rows
                    self._scores[target.id] = self._worst(rows)
                at += len(questions)
            self._held = self._built()

    def add(self, target: Target) -> None:
        """Hold its questions and topics."""
        self.take([target])

    def drop(self, target: str) -> None:
        """Hold them no more."""
        with self._lock:
            self._forget(target)
            self._held = self._built()

    def _forget(self, target: str) -> None:
        self._rows.pop(target, None)
        self._scores.pop(target, None)

    def _worst(self, rows: sp.csr_matrix) -> NDArray[np.float64]:
        """Of each calibrating prompt the likeness to the nearest of some questions, ``[n]``."""
        if not self._count:
            return np.empty(0)
        nearest = (self._calibrating @ rows.T).max(1).toarray().ravel()
        return np.asarray(np.maximum.reduceat(nearest, self._starts))

    def _built(self) -> _Held:
        if not self._rows:
            return _Held(None, np.empty(0, dtype=np.int64), (), None)
        starts = np.cumsum([0, *[r.shape[0] for r in self._rows.values()]])[:-1]
        bound = self.settings.bound(np.max(list(self._scores.values()), axis=0))
        return _Held(Columns(sp.vstack(list(self._rows.values()))), starts, tuple(self._rows), bound)

    def scores(self, conversation: Conversation) -> dict[str, float]:
        """Likeness of a conversation to each target, in [-1, 1]."""
        return self._scored(self._held, conversation)

    def _scored(self, held: _Held, conversation: Conversation) -> dict[str, float]:
        read = pieces(conversation, sentences=self.settings.sentences)
        if held.columns is None or not read:
            return {}
        nearest = np.maximum.reduceat(held.columns.against(self.encoder.encode(read)).max(1), held.starts)
        return dict(zip(held.targets, nearest.tolist(), strict=True))

    def request(self, conversation: Conversation) -> list[Hit]:
        """Targets that one of its pieces is more like than the threshold allows, the nearest first."""
        held = self._held
        found = self._scored(held, conversation)
        return [Hit(t, s) for t, s in sorted(found.items(), key=lambda f: -f[1]) if held.bound and held.bound.passed(s)]
