"""Names and aliases, matched whole, however they are spaced, spelt or encoded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from pydantic import Field

from expunge.guards.conversation import Conversation
from expunge.guards.folding import parted
from expunge.guards.parts import Detector, Hit, Hook, Material, Watcher, detector
from expunge.guards.target import Target
from expunge.guards.terms import TermIndex


@detector
class Terms(Detector):
    """Names and aliases of targets, in the whole conversation and in the answer.

    They are held as keyed digests (:mod:`expunge.guards.terms`): the cost does not grow with their number, and a copy of what is
    held does not tell them to who lacks the key. A name that is described rather than said passes.
    """

    name: ClassVar[str] = "terms"
    title: ClassVar[str] = "Names, matched whole"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST, Hook.TEXT})

    encodings: bool = Field(
        True, description="also in Base64, hexadecimal or percent encoding, backwards, by rot13, with digits for letters"
    )

    def fit(self, material: Material) -> Watcher:
        """Hold the entities of all targets."""
        made = TermWatcher(TermIndex(material.key, encodings=self.encodings))
        for target in material.targets:
            made.add(target)
        return made


class TermWatcher(Watcher):
    """Looks terms up.

    Args:
        index: empty, or filled.
    """

    def __init__(self, index: TermIndex) -> None:
        self.index = index

    def covers(self, target: Target) -> bool:
        """Whether it has a name."""
        return bool(target.entities)

    def add(self, target: Target) -> None:
        """Hold its entities."""
        self.index.add(target.id, target.entities)

    def drop(self, target: str) -> None:
        """Hold them no more."""
        self.index.drop(target)

    def request(self, conversation: Conversation) -> list[Hit]:
        """Targets that any turn names; turns are read on their own and joined, so a name that is cut by a turn is found too."""
        return _hits(m.target for m in self.index.find(conversation.text))

    def answer(self, conversation: Conversation, text: str, start: int, final: bool) -> list[Hit]:
        """Targets that the answer names, or ends to name where it goes on from what the request has begun."""
        found = self.index.find(text, start)
        if start == 0 and (conversation.verbatim or conversation.messages[-1].role == "assistant"):
            begun = _tail(conversation.text, self.index.longest)
            found += [m for m in self.index.find(begun + text) if m.start < len(begun) < m.end]
        return _hits(m.target for m in found)

    def safe(self, text: str, start: int) -> int:
        """All but the letters that the longest term can still begin in."""
        return self.index.safe(text, start)


def _tail(text: str, letters: int) -> str:
    """The end of a text that holds so many letters and digits, from the begin of a word."""
    at = len(text)
    for word in reversed(parted(text)):
        at = word.start
        letters -= len(word.letters)
        if letters <= 0:
            break
    return text[at:]


def _hits(targets: Iterable[str]) -> list[Hit]:
    return [Hit(t, 1.0) for t in dict.fromkeys(targets)]
