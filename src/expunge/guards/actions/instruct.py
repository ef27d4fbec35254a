"""An instruction before the conversation: the guardrail prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, field_validator

from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.parts import Action, Doer, Hit, Hook, Material, Orders, action
from expunge.guards.target import Target


@action
class Instruct(Action):
    """A system text that asks the model to behave as if it did not know the targets (Thaker et al. 2024, arXiv 2403.03329).

    The wording is ours. The names stand in the prompt: whoever makes the model repeat its prompt has the list, and long lists
    cost tokens and utility. Nothing keeps a model from ignoring it.
    """

    name: ClassVar[str] = "instruct"
    title: ClassVar[str] = "Instruction in the prompt"
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST})
    rewrites: ClassVar[bool] = True

    text: str = Field(
        "You know nothing about the following: {targets}. If you are asked about them, say that you do not know. "
        "Answer everything else as usual.",
        description="the instruction; {targets} stands for the names",
    )
    limit: int = Field(200, ge=1, description="names at most; more would not fit many contexts")

    @field_validator("text")
    @classmethod
    def _place(cls, value: str) -> str:
        if value.count("{targets}") != 1:
            raise ValueError("it must contain {targets} once")
        return value

    def prepare(self, material: Material) -> Doer:
        """Write the list.

        Raises:
            InputError: a target has neither names nor topics, or there are more than ``limit``.
        """
        made = _Instructs(self.text, self.limit)
        for target in material.targets:
            made.add(target)
        return made


class _Instructs(Doer):
    def __init__(self, text: str, limit: int) -> None:
        self.text, self.limit = text, limit
        self.names: dict[str, tuple[str, ...]] = {}

    def add(self, target: Target) -> None:
        names = target.entities or target.topics
        held = sum(map(len, self.names.values()))
        if not names:
            raise InputError("An instruction needs names, and the target has neither entities nor topics.", "Give some.")
        if held + len(names) > self.limit:
            raise InputError(
                f"{held + len(names)} names are too many for an instruction: at most {self.limit}.", "Use the guard 'filter'."
            )
        self.names = {**self.names, target.id: names}

    def drop(self, target: str) -> None:
        self.names = {k: v for k, v in self.names.items() if k != target}

    def orders(self, conversation: Conversation, hits: Sequence[Hit]) -> Orders:
        named = [n for names in self.names.values() for n in names]
        return (
            Orders(conversation=conversation.instructed(self.text.replace("{targets}", "; ".join(named)))) if named else Orders()
        )
