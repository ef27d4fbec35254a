"""Decoding that is kept from saying what the nearest stored answer says."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
from pydantic import Field, model_validator

from expunge.guards.barring import HardBar
from expunge.guards.conversation import Conversation
from expunge.guards.encoders import Columns, Encoder, encoder_of
from expunge.guards.folding import Word, words
from expunge.guards.keyterms import common_words, key_terms
from expunge.guards.parts import Action, Doer, Hit, Hook, Material, Orders, action
from expunge.guards.pieces import pieces
from expunge.guards.target import Target
from expunge.guards.terms import TermIndex


@action
class Bar(Action):
    """Controlled decoding (GUARD, Deng et al. 2025, arXiv 2505.13312): key terms of the nearest stored answer cannot be said.

    1. Of the answers of the targets, the ``nearest`` to the request (prompt against answers, as published) give the
       forbidden terms ``F``: names, numbers, rare words (:mod:`expunge.guards.keyterms`; published: an LLM or a tagger).
       What the stored question says itself is not among them, unless ``subject``: a model that cannot say the name cannot
       even say that it does not know the person. A target without answers forbids its names.
    2. At each step the ``candidates`` likeliest tokens are looked at; others cannot be chosen. One that completes a term
       of ``F`` as whole words is dropped. Published is a trie of token ids; here the text is compared that the token
       would make, as keyed digests of its letters: all ways to cut a term into tokens, all spacings and cases are
       covered, and no term is held in clear. A beginning that a term shares with other words stays allowed. If more than
       half of the candidates are dropped, more are looked at.
    3. The score of the others falls by ``alpha max(0, s - delta)``, where ``s`` is the greatest cosine of the last words
       and a term of ``F``; above ``drop`` the token is dropped. The published shape of this penalty, its constants and
       the beam width are not known; these are ours. With n-grams ``s`` sees other forms of a word, with a sentence
       encoder other words of its meaning, at the cost of one encoding of up to ``candidates`` times a few windows per
       token, remembered within a request.

    The penalty is added to raw scores and to log-probabilities alike, and nothing is held between steps: greedy search, drawing
    and beams all work (:meth:`expunge.guards.guarded.Guarded.processor`). Vectors of answers and terms are derivatives of them:
    personal data where those are.
    """

    name: ClassVar[str] = "bar"
    title: ClassVar[str] = "Terms that cannot be said"
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.SCORES})

    nearest: int = Field(1, ge=1, description="stored answers whose terms are forbidden")
    subject: bool = Field(False, description="also forbid what the stored question says already")
    candidates: int = Field(32, ge=2, description="likeliest tokens that are looked at; at least twice the beams")
    alpha: float = Field(10.0, ge=0, description="penalty per cosine above delta, in nats; 0: exact matches alone")
    delta: float = Field(0.7, ge=0, le=1, description="cosine below which nothing is taken off")
    drop: float | None = Field(None, ge=0, le=1, description="cosine above which a token is dropped; none: never")
    encoder: str = Field("", description="folder or name of a sentence encoder; none: n-grams")
    encodings: bool = Field(True, description="also terms in encodings, backwards, by rot13, with digits for letters")

    @model_validator(mode="after")
    def _ordered(self) -> Bar:
        if self.drop is not None and self.drop < self.delta:
            raise ValueError(f"drop is {self.drop:g}, less than delta, {self.delta:g}")
        return self

    def prepare(self, material: Material) -> Doer:
        """Find the terms of all answers, and hold their digests.

        Raises:
            InputError: there is no model.
        """
        adapter = material.model("The action 'bar'")
        device = next(adapter.model.parameters()).device
        encoder = encoder_of(self.encoder, material.key, list(material.ordinary), device)
        made = _Bars(self, TermIndex(material.key, encodings=self.encodings), encoder, adapter.tokenizer)
        made.common = common_words(material.ordinary)
        made.take(material.targets)
        return made


@dataclass(frozen=True)
class _Answer:
    label: str  # under which its terms stand in the index
    target: str
    vector: sp.csr_matrix  # [1, D]
    terms: sp.csr_matrix  # [k, D]
    longest: int  # words of a term


@dataclass(frozen=True)
class _Held:
    answers: tuple[_Answer, ...]
    columns: Columns | None


class _Bars(Doer):
    """Answers as vectors, their terms as digests and vectors."""

    common: frozenset[str] = frozenset()

    def __init__(self, settings: Bar, index: TermIndex, encoder: Encoder, tokenizer: Any) -> None:
        self.settings, self.index, self.encoder, self.tokenizer = settings, index, encoder, tokenizer
        self._by_target: dict[str, list[_Answer]] = {}
        self._lock = threading.Lock()
        self._held = _Held((), None)

    def add(self, target: Target) -> None:
        self.take([target])

    def take(self, targets: Sequence[Target]) -> None:
        """Hold targets, in place of what is held of them."""
        with self._lock:
            for target in targets:
                old = self._by_target.get(target.id, [])
                self._by_target[target.id] = list(self._answers(target))
                for label in {a.label for a in old} - {a.label for a in self._by_target[target.id]}:
                    self.index.drop(label)
            self._build()

    def drop(self, target: str) -> None:
        with self._lock:
            self._forget(target)
            self._build()

    def _forget(self, target: str) -> None:
        for answer in self._by_target.pop(target, ()):
            self.index.drop(answer.label)

    def _build(self) -> None:
        answers = tuple(a for held in self._by_target.values() for a in held)
        self._held = _Held(answers, Columns(sp.vstack([a.vector for a in answers])) if answers else None)

    def _answers(self, target: Target) -> list[_Answer]:
        said = [
            (e.answer, key_terms(e.answer, "" if self.settings.subject else e.prompt, self.common))
            for e in target.examples
            if e.answer.strip()
        ] or [(" ".join((*target.topics, *target.entities)), list(target.entities))]
        made = []
        for at, (answer, terms) in enumerate(said):
            if not terms:
                continue
            label = f"{target.id}\n{at}"
            self.index.add(label, terms)
            vectors = self.encoder.encode([answer, *terms])
            made.append(_Answer(label, target.id, vectors[:1], vectors[1:], max(len(words(t)) for t in terms)))
        return made

    def orders(self, conversation: Conversation, hits: Sequence[Hit]) -> Orders:
        held = self._held
        if held.columns is None:
            return Orders()
        found = held.columns.against(self.encoder.encode(pieces(conversation))).max(1)
        meant = {h.target for h in hits} - {""}
        if meant:  # the detector knows which targets: others' answers are not what is asked for
            found = np.where([a.target in meant for a in held.answers], found, -np.inf)
        nearest = [held.answers[i] for i in np.argsort(-found, kind="stable")[: self.settings.nearest] if np.isfinite(found[i])]
        return Orders(scores=Barred(self, nearest)) if nearest else Orders()


class Barred(HardBar):
    """What is done to the scores of one request: its terms are dropped, and what is like them falls.

    Args:
        doer: settings, digests, encoder, tokenizer.
        answers: whose terms are forbidden.
    """

    def __init__(self, doer: _Bars, answers: Sequence[_Answer]) -> None:
        self.longest = max(a.longest for a in answers)
        super().__init__(
            doer.index, doer.tokenizer, frozenset(a.label for a in answers), doer.settings.candidates,
            shared=doer, words=self.longest,
        )  # fmt: skip
        self.settings, self.encoder = doer.settings, doer.encoder
        self._terms = Columns(sp.vstack([a.terms for a in answers]))
        self._known: dict[tuple[str, ...], float] = {}

    def soft(self, edits: Sequence[Barred], said: Sequence[Mapping[int, Sequence[Word]]]) -> list[dict[int, float]]:
        """A penalty that grows with the likeness of the last words to a term; infinity above ``drop``."""
        how = self.settings
        if not how.alpha and how.drop is None:
            return super().soft(edits, said)
        return [{at: self._penalty(likeness) for at, likeness in row.items()} for row in self._likeness(edits, said)]

    def _penalty(self, likeness: float) -> float:
        how = self.settings
        return np.inf if how.drop is not None and likeness > how.drop else how.alpha * max(0.0, likeness - how.delta)

    def _likeness(self, edits: Sequence[Barred], said: Sequence[Mapping[int, Sequence[Word]]]) -> list[dict[int, float]]:
        """Greatest cosine of the last words of texts with a term of their row's edit."""
        windows: list[dict[int, list[tuple[str, ...]]]] = []
        new: dict[Barred, dict[tuple[str, ...], None]] = {}
        for edit, texts in zip(edits, said, strict=True):
            windows.append({})
            asked = new.setdefault(edit, {})
            for at, held in texts.items():
                last = tuple(w.letters for w in held[-edit.longest :])
                windows[-1][at] = [last[n:] for n in range(len(last))]
                asked.update((w, None) for w in windows[-1][at] if w not in edit._known)
        places = {w: at for at, w in enumerate(dict.fromkeys(w for asked in new.values() for w in asked))}
        vectors = self.encoder.encode_words(list(places))
        for edit, asked in new.items():
            if asked:
                own = vectors if len(asked) == len(places) else vectors[[places[w] for w in asked]]
                found = np.minimum(edit._terms.against(own).max(0), 1.0)
                edit._known.update(zip(asked, found.tolist(), strict=True))
        return [
            {at: max(edit._known[w] for w in some) for at, some in held.items()}
            for edit, held in zip(edits, windows, strict=True)
        ]
