"""A fixed answer in place of the model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from expunge.guards.conversation import Conversation
from expunge.guards.parts import Action, Doer, Hit, Hook, Material, Orders, action
from expunge.guards.policy import SORRY


@action
class Refuse(Action):
    """A fixed sentence. Noticed in the request, the model is not asked; noticed in the answer, the answer ends there.

    The sentence is the same for all targets, so that it does not say which one was met. That it comes at all tells that something
    is hidden (Shumailov et al. 2024, arXiv 2407.00106).
    """

    name: ClassVar[str] = "refuse"
    title: ClassVar[str] = "Fixed answer"
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST, Hook.TEXT})

    text: str = Field(SORRY, min_length=1, description="what is said")

    def prepare(self, material: Material) -> Doer:
        """Nothing to prepare."""
        return _Refuses(self.text)


class _Refuses(Doer):
    def __init__(self, text: str) -> None:
        self.text = text

    def orders(self, conversation: Conversation, hits: Sequence[Hit]) -> Orders:
        return Orders(say=self.text)
