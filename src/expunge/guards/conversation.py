"""What a guard sees of a request: turns of a conversation, or a text that is to be continued."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from expunge.core.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: one of :data:`ROLES`; empty for a text that is to be continued as it is.
        content: its text.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """All turns before the answer, the oldest first.

    Everything that reaches the model stands here (system text, retrieved documents, results of tools), so a detector that reads a
    conversation has seen what the answer can be made of.
    """

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, given: str | Self | Iterable[Mapping[str, Any] | tuple[str, str]]) -> Conversation:
        """From a question, from turns as of the chat interface (``{"role": ..., "content": ...}``), or from pairs.

        Raises:
            InputError: no turn, an unknown role, or content that is no text.
        """
        if isinstance(given, Conversation):
            return given
        if isinstance(given, str):
            return cls((Message("user", given),))
        turns = [Message(*t) if isinstance(t, tuple) else Message(t.get("role", ""), t.get("content", "")) for t in given]
        if not turns:
            raise InputError("The conversation has no turns.", "Give at least one message of a user.")
        for turn in turns:
            if turn.role not in ROLES:
                raise InputError(f"The role {turn.role!r} is unknown.", f"Use one of {', '.join(ROLES)}.")
            if not isinstance(turn.content, str):
                raise InputError("The content of a message must be a text.", "Leave pictures and other parts out.")
        return cls(tuple(turns))

    @classmethod
    def text_to_continue(cls, text: str) -> Conversation:
        """A text that the model continues as it is, without a template."""
        return cls((Message("", text),))

    @property
    def verbatim(self) -> bool:
        """Whether it is a text that is to be continued as it is."""
        return self.messages[0].role == ""

    @property
    def text(self) -> str:
        """All turns, one after the other, between line breaks."""
        return "\n".join(m.content for m in self.messages)

    @property
    def asked(self) -> str:
        """The last turn that is not the assistant's own."""
        return next((m.content for m in reversed(self.messages) if m.role != "assistant"), "")

    def instructed(self, text: str) -> Conversation:
        """With an instruction before all else: a system turn, joined to one that is there; or a paragraph before a text."""
        first, rest = self.messages[0], self.messages[1:]
        if self.verbatim:
            return replace(self, messages=(Message("", f"{text}\n\n{first.content}"), *rest))
        if first.role in ("system", "developer"):
            return replace(self, messages=(Message(first.role, f"{text}\n\n{first.content}"), *rest))
        return replace(self, messages=(Message("system", text), *self.messages))

    def asking(self, text: str) -> Conversation:
        """With the last turn that is not the assistant's own exchanged for a text."""
        at = next(i for i in reversed(range(len(self.messages))) if self.messages[i].role != "assistant")
        made = list(self.messages)
        made[at] = Message(made[at].role, text)
        return replace(self, messages=tuple(made))
