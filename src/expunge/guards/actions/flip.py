"""In-context unlearning: solved examples in the prompt, those of the target with wrong answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.guards.actions.tag import nearest
from expunge.guards.conversation import Conversation
from expunge.guards.folding import words
from expunge.guards.parts import Action, Doer, Hit, Hook, Material, Orders, action
from expunge.guards.prompts import put
from expunge.guards.target import Shown, Target


@action
class Flip(Action):
    """``K`` wrong examples of the target, ``L`` right ones, then the question (Pawelczyk et al. 2023, arXiv 2310.07579).

    A wrong answer is another one of ``labels``, where there are such, or that of another example of what is hidden. The question
    itself never stands among the examples. The paper takes labels of classes, K = 1 and L from 2 to 6; for questions with answers
    K = 5 and L = 4 have been used. The model is led to say something wrong, not that it does not know; and the questions of the
    target stand in the prompt.
    """

    name: ClassVar[str] = "flip"
    title: ClassVar[str] = "Wrong examples in the prompt"
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST})
    rewrites: ClassVar[bool] = True

    flipped: int = Field(1, ge=1, le=50, description="K: examples of the target with wrong answers, those most like the question")
    right: int = Field(6, ge=0, le=50, description="L: right examples after these")
    examples: tuple[Shown, ...] = Field((), description="right examples; none: ordinary prompts with the model's own answers")
    labels: tuple[str, ...] = Field((), description="all answers that there are, where they are classes; none: free answers")
    line: str = Field(
        "{prompt}\n{answer}\n\n", description="how an example is written; {prompt} and {answer} stand for its parts"
    )
    max_tokens: int = Field(48, ge=1, description="of the model's own answers")
    room: int = Field(
        128,
        ge=1,
        description="tokens of the model's context that stay free for the answer: examples that leave less are left out",
    )

    @field_validator("line")
    @classmethod
    def _places(cls, value: str) -> str:
        if value.count("{prompt}") != 1 or value.count("{answer}") != 1:
            raise ValueError("it must contain {prompt} and {answer} once each")
        return value

    def prepare(self, material: Material) -> Doer:
        """Collect examples.

        Raises:
            InputError: there are too few right ones, or a target has no examples.
        """
        made = _Flips(self, self._right(material), material.key, material.adapter)
        for target in material.targets:
            made.add(target)
        return made

    def _right(self, material: Material) -> list[Shown]:
        found = list(self.examples)
        if not found and self.right and material.ordinary and material.adapter is not None:
            adapter = material.adapter
            asked = list(material.ordinary)[: self.right + 1]  # one more, for a question that is one of them
            encoded = [adapter.encode(Record(id=f"o{i}", prompt=p, answer="x")) for i, p in enumerate(asked)]
            said = adapter.generate(adapter.model, encoded, self.max_tokens)
            found = [Shown(prompt=p, answer=a.text) for p, a in zip(asked, said, strict=True)]
        if len(found) < self.right:
            raise InputError(
                f"{self.right} right examples are wanted, and there are {len(found)}.",
                "Give them as examples of the action, or more ordinary prompts and a model.",
            )
        return found


class _Flips(Doer):
    def __init__(self, settings: Flip, right: Sequence[Shown], key: bytes, adapter: LanguageAdapter | None) -> None:
        self.settings, self.right, self.adapter = settings, list(right), adapter
        self.key = hashlib.sha256(key).digest()
        self.held: dict[str, tuple[Shown, ...]] = {}

    def add(self, target: Target) -> None:
        examples = tuple(e for e in target.examples if e.prompt.strip() and e.answer.strip())
        if not examples:
            raise InputError("Wrong examples are made of examples, and the target has none.", "Give questions with answers.")
        self.held = {**self.held, target.id: examples}

    def drop(self, target: str) -> None:
        self.held = {k: v for k, v in self.held.items() if k != target}

    def orders(self, conversation: Conversation, hits: Sequence[Hit]) -> Orders:
        held, settings = self.held, self.settings
        noticed = list(held) if any(not h.target for h in hits) else [h.target for h in hits if h.target in held]
        asked = conversation.asked
        every = [e for t in noticed for e in held[t]]
        answers = settings.labels or sorted({e.answer for examples in held.values() for e in examples})
        chosen = [e for e in nearest(asked, every) if words(e.prompt) != words(asked)][: settings.flipped]
        digest = hashlib.blake2b(asked.encode(), key=self.key, digest_size=8, person=b"expunge-flip").digest()
        drawn = np.random.default_rng(int.from_bytes(digest, "big"))
        lines = []
        for shown in chosen:
            others = [a for a in answers if words(a) != words(shown.answer)]
            if others:
                lines.append(self._written(Shown(prompt=shown.prompt, answer=others[int(drawn.integers(len(others)))])))
        if not lines:
            return Orders()
        right = [self._written(e) for e in self.right if words(e.prompt) != words(asked)][: settings.right]
        while not self._fits(made := conversation.asking("".join([*lines, *right]) + asked)):
            if right:
                right.pop()
            elif len(lines) > 1:  # one stays: without it nothing is hidden, and a request that is too long is refused as such
                lines.pop()
            else:
                break
        return Orders(conversation=made)

    def _fits(self, conversation: Conversation) -> bool:
        """Whether the model's context has room for an answer."""
        if self.adapter is None or self.adapter.context is None:
            return True
        try:
            return len(put(self.adapter, conversation).ids) + self.settings.room <= self.adapter.context
        except InputError:
            return False

    def _written(self, shown: Shown) -> str:
        return self.settings.line.replace("{prompt}", shown.prompt).replace("{answer}", shown.answer)
