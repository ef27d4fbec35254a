"""A conversation as tokens, and which characters each of them stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.tokenise import DEFAULT_TEMPLATE
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.guards.conversation import Conversation, Message

_BEFORE = 4  #: tokens that are decoded with one to see which text it adds


@dataclass(frozen=True)
class Prompt:
    """What the model reads of a request.

    Attributes:
        ids: int64 ``[T]``.
        text: as decoded, special tokens among it.
        spans: characters of each token.
        content: which tokens stand for what the turns say, bool ``[T]``.
    """

    ids: NDArray[np.int64]
    text: str
    spans: tuple[tuple[int, int], ...]
    content: NDArray[np.bool_]


def special_texts(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer reads as special tokens, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {str(t) for t in getattr(tokenizer, "all_special_tokens", [])} | {str(t) for t in added.values() if t.special}
    return sorted((t for t in found if t.strip()), key=len, reverse=True)


def cleaned(conversation: Conversation, tokenizer: Any) -> Conversation:
    """Without special tokens in what the turns say: a user could otherwise close a turn, or write one of the system."""
    out = []
    for message in conversation.messages:
        text, before = message.content, None
        while text != before:  # what is left when one is taken out may make another
            before = text
            for special in special_texts(tokenizer):
                text = text.replace(special, "")
        out.append(Message(message.role, text))
    return Conversation(tuple(out))


def put(adapter: LanguageAdapter, conversation: Conversation) -> Prompt:
    """A conversation as the model reads it: by the chat template, or the template of the adapter.

    Without a chat template, what systems and tools say stands as paragraphs, and earlier questions with their answers as the
    template has them.

    Raises:
        InputError: the template does not take its turns, or it leaves no room in the context.
    """
    given = [m.content for m in conversation.messages]
    if conversation.verbatim:
        record = Record(id="request", prompt=given[0], answer=" x", verbatim=True)
    elif len(given) == 1 and conversation.messages[0].role == "user":
        record = Record(id="request", prompt=given[0], answer="x")
    elif not adapter.templated:
        record = Record(
            id="request", prompt=_joined(conversation, adapter.template or DEFAULT_TEMPLATE), answer=" x", verbatim=True
        )
    else:
        record = Record(id="request", messages=tuple((m.role, m.content) for m in conversation.messages), answer="x")
    if not any(g.strip() for g in given):
        raise InputError("The request says nothing.", "Give a message with a text.")
    example = adapter.encode(record)
    ids = np.asarray(example.data.ids[: example.data.start], dtype=np.int64)
    return described(adapter.tokenizer, ids, given)


def _joined(conversation: Conversation, template: str) -> str:
    turns = list(conversation.messages)
    out, asked = [], ""
    for at, turn in enumerate(turns):
        last = at + 1 == len(turns)
        if turn.role == "user":
            asked = f"{asked}\n{turn.content}".strip()
            if last or turns[at + 1].role not in ("assistant", "user"):
                out.append(template.partition("{answer}")[0].replace("{prompt}", asked).rstrip(" "))
                asked = ""
        elif turn.role == "assistant":
            before, _, after = template.partition("{answer}")
            out.append(before.replace("{prompt}", asked) + turn.content + after)
            asked = ""
        else:
            out.append(turn.content)
    return "\n\n".join(out)


def described(tokenizer: Any, ids: NDArray[np.int64], said: Sequence[str] = ()) -> Prompt:
    """A prompt from its ids.

    Args:
        tokenizer: of the model.
        ids: ``[T]``.
        said: what the turns say, in their order; none: all that is no special token is content.
    """
    held = [int(i) for i in ids]
    pieces = []
    for at in range(len(held)):
        begin = max(0, at - _BEFORE)
        known, text = _read(tokenizer, held[begin:at]), _read(tokenizer, held[begin : at + 1])
        # A character of several tokens belongs to the last of them.
        pieces.append("" if text.endswith("\ufffd") and at + 1 < len(held) else text[len(known.rstrip("\ufffd")) :])
    text, spans, end = "".join(pieces), [], 0
    for piece in pieces:
        spans.append((end, end + len(piece)))
        end += len(piece)
    special = set(getattr(tokenizer, "all_special_ids", []))
    content = np.array([i not in special for i in held], dtype=np.bool_)
    places: list[tuple[int, int]] = []
    at = 0
    for turn in said:
        found = text.find(turn.strip(), at)
        if found < 0:
            places = []
            break
        places.append((found, found + len(turn.strip())))
        at = places[-1][1]
    if places:
        content &= np.array([any(a < stop and b > start for start, stop in places) for a, b in spans], dtype=np.bool_)
    return Prompt(np.asarray(ids, dtype=np.int64), text, tuple(spans), content)


def _read(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


class Reader:
    """The text of tokens that come one by one; each call costs the same, whatever came before.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from, self._known = 0, 0
        self.text = ""

    def add(self, token: int) -> str:
        """Take a token in; all the text so far. A character that is not whole yet is left out."""
        self._ids.append(token)
        before, now = (self._spoken(self._ids[self._from : end]) for end in (self._known, len(self._ids)))
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self.text += now[len(before) :]
            # The tokens of the step before stay as a context: some decoders drop the white space of a first token.
            self._from, self._known = self._known, len(self._ids)
        return self.text

    def _spoken(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
