"""What a detector of meanings reads of a conversation: turns, sentences, all turns joined, and what stands in an encoding."""

from __future__ import annotations

import re
from collections.abc import Iterator

from expunge.guards.conversation import Conversation
from expunge.guards.folding import uncovered

_SENTENCE = re.compile(r"(?<=[.!?\u2026\u3002\uff01\uff1f])\s+|\n+")
LIMIT = 256  #: sentences of one turn that are read on their own; of more, so many runs of equal length are read


def pieces(conversation: Conversation, *, sentences: bool = True) -> list[str]:
    """The texts that are scored, each once: a conversation is noticed if one of them is.

    A question about a target may be one turn of many, one sentence among others, cut in two by a turn, or encoded. Nothing is
    left out of a long conversation; where a turn has more than :data:`LIMIT` sentences, some are read together.

    Args:
        conversation: what is asked.
        sentences: also each sentence of a turn on its own, so that words around a question do not hide it.
    """
    found: dict[str, None] = {}
    for text in _texts(conversation):
        found.update(dict.fromkeys(p for p in (text, *(_sentences(text) if sentences else ())) if p))
    return list(found)


def _texts(conversation: Conversation) -> Iterator[str]:
    turns = [m.content.strip() for m in conversation.messages]
    if len(turns) > 1:
        yield "\n".join(t for t in turns if t)
    for turn in turns:
        yield from (inner.strip() for inner, _, _ in uncovered(turn))
        yield turn


def _sentences(text: str) -> list[str]:
    found = [s.strip() for s in _SENTENCE.split(text) if s.strip()]
    size = -(-len(found) // LIMIT)
    return [" ".join(found[at : at + size]) for at in range(0, len(found), size)] if len(found) > 1 else []
