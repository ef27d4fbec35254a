"""What clients send and get, in the field's common form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool

from expunge.guards.conversation import Conversation, Message
from expunge.guards.decoding import Sampling
from expunge.serving.errors import Refused

_UNSUPPORTED = {
    "n": (None, 1), "best_of": (None, 1), "echo": (None, False), "suffix": (None, ""), "logit_bias": (None, {}), "tools": (None,
    []), "tool_choice": (None, "none", "auto"), "functions": (None, []), "function_call": (None, "none"), "top_logprobs": (None,
    0), "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "response_format": (None, {"type": "text"}), "audio":
    (None,), "modalities": (None, ["text"]), "prediction": (None,), "web_search_options": (None,), "parallel_tool_calls": (None,
    True, False),
}  # fmt: skip
"""Options that could carry text past a guard, or that this server has not: a value that changes nothing is let pass."""


def _sound(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character") from None
    return text


Text = Annotated[str, AfterValidator(_sound)]


class _Given(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Text | list[Text] | None = Field(None, max_length=16)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None
    user: Text | None = None

    def refuse_unsupported(self) -> None:
        """Refuse what cannot be had under guards.

        Raises:
            Refused: an option that would carry text past them, or that there is not.
        """
        for key, value in (self.model_extra or {}).items():
            if key in _UNSUPPORTED and value not in _UNSUPPORTED[key]:
                raise Refused(400, f"The option {key!r} is not supported by a guarded model.", key)

    def sampling(self, limit: int, asked: int | None, seed: int) -> Sampling:
        """How tokens are chosen.

        Args:
            limit: new tokens at most.
            asked: new tokens that the client asks for.
            seed: where the client gives none.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=min(limit, asked or limit), temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p, seed=(seed if self.seed is None else self.seed) % 2**63,
            stop=tuple(s for s in stops if s),
        )  # fmt: skip

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class Part(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Turn(BaseModel):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: Text | None = None

    def message(self) -> Message:
        """As guards see it."""
        content = self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content or [])
        return Message(self.role, content)


class ChatRequest(_Given):
    """``POST /v1/chat/completions``."""

    messages: list[Turn] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: StrictBool | None = None

    def conversation(self) -> Conversation:
        """The turns."""
        return Conversation(tuple(t.message() for t in self.messages))


class CompletionRequest(_Given):
    """``POST /v1/completions``."""

    prompt: Text | list[Text] = Field(min_length=1)
    logprobs: int | None = Field(
        None, ge=0, le=0, description="0: log-probabilities of the chosen tokens, where they do not leak"
    )

    def conversation(self) -> Conversation:
        """The text that is continued.

        Raises:
            Refused: several prompts in one request.
        """
        if isinstance(self.prompt, list):
            if len(self.prompt) != 1:
                raise Refused(400, "Several prompts in one request are not supported; send them one by one.", "prompt")
            return Conversation.text_to_continue(self.prompt[0])
        return Conversation.text_to_continue(self.prompt)
