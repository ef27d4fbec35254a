"""What a conversation says, whoever says it: facts of targets, in questions, in what they bring along, and in answers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field

from expunge.guards.content import FactIndex, aliases, key_words, stem
from expunge.guards.conversation import Conversation
from expunge.guards.folding import words
from expunge.guards.parts import Detector, Hit, Hook, Material, Watcher, detector
from expunge.guards.target import Target

_END = re.compile(r"[.!?…。！？][\"'”’)\]]*\s+|\n+")  # noqa: RUF001
_PRONOUNS = frozenset(("he", "she", "they", "it", "him", "her", "them", "his", "hers", "their", "theirs", "its"))
_HOLD = 400  #: characters that are held back at most for the end of a sentence


@detector
class Content(Detector):
    """Facts of targets about their subjects, wherever the knowledge comes from.

    Unlearning takes knowledge out of weights; a user can bring it back with the prompt, and a model that never had it then
    reasons on (Shumailov et al. 2024, arXiv 2407.00106). So this looks at the whole conversation together with the answer, and
    fires when they state a fact of a target while its subject is spoken of. A fact is the words of an example's answer that its
    question does not hold: the names and numbers among them, or else those that are not words of every day. It may be stated
    bit by bit, over several turns and the answer (a mosaic). The subject is spoken of if a turn or the answer names it, or if
    the conversation describes it by ``described`` of its facts. With ``scope=turn`` the last question or the answer must name
    it, by its name, by an alias that the conversation gives it in one of the usual forms ("call X Zorp"), or by a pronoun:
    fewer answers are stopped for what was spoken of long before. It fires on questions that state the fact themselves, too:
    solved examples, documents, definitions.

    Names and words are held as keyed digests. What it cannot see: synonyms and numbers written otherwise, words spelt letter by
    letter over turns, and what follows from facts that may be told.
    """

    name: ClassVar[str] = "content"
    title: ClassVar[str] = "Facts, in questions and answers"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST, Hook.TEXT})

    share: float = Field(0.75, gt=0, le=1, description="of a fact's words, how many state it; at least one")
    described: int = Field(
        3, ge=0, description="facts of a target by which it is described without its name; 0: a name is needed"
    )
    scope: Literal["conversation", "turn"] = Field(
        "conversation", description="where the subject must be spoken of: anywhere, or in the last question or the answer"
    )
    common: float = Field(
        0.05, gt=0, le=1, description="a word that stands in more than this share of ordinary texts says nothing"
    )
    questions: bool = Field(True, description="also fire on requests that state a fact themselves")
    encodings: bool = Field(True, description="names also in encodings, as the detector 'terms' has it")

    def fit(self, material: Material) -> Watcher:
        """Hold names and facts of all targets; those without examples are none of this detector's."""
        seen: dict[str, int] = {}
        for text in material.ordinary:
            for word in key_words(text):
                seen[word] = seen.get(word, 0) + 1
        often = [w for w, n in seen.items() if n > max(2, self.common * len(material.ordinary))]
        made = ContentWatcher(FactIndex(material.key, self.share, often, encodings=self.encodings), self)
        for target in material.targets:
            made.add(target)
        return made


class ContentWatcher(Watcher):
    """Looks for facts.

    Args:
        index: of facts and subjects.
        settings: of the detector.
    """

    def __init__(self, index: FactIndex, settings: Content) -> None:
        self.index, self.settings = index, settings

    def add(self, target: Target) -> None:
        """Hold its facts."""
        self.index.add(target)

    def drop(self, target: str) -> None:
        """Hold them no more."""
        self.index.drop(target)

    def request(self, conversation: Conversation) -> list[Hit]:
        """Targets of which the conversation already states a fact."""
        if not self.settings.questions or not self.index.facts:
            return []
        stated = self.index.stated(self.index.said(conversation.text))
        return self._hits(stated, self._meant(conversation, "", stated)) if stated else []

    def answer(self, conversation: Conversation, text: str, start: int, final: bool) -> list[Hit]:
        """Targets of which conversation and answer together state a fact, some of it by the answer; looked at by the sentence."""
        if not self.index.facts or (not final and self.safe(text, start) <= start):
            return []
        new = self.index.said(text)
        stated = self.index.stated(self.index.said(conversation.text) | new, new)
        return self._hits(stated, self._meant(conversation, text, stated)) if stated else []

    def safe(self, text: str, start: int) -> int:
        """All whole sentences; of a long one without an end, all whole words."""
        ends = [m.end() for m in _END.finditer(text, start)]
        at = ends[-1] if ends else start
        if len(text) - at > _HOLD:
            at = max(at, text.rfind(" ", at) + 1)
        return at

    def _meant(self, conversation: Conversation, text: str, stated: Iterable[str]) -> set[str]:
        """Targets that are spoken of: named, by an alias too, or described."""
        whole, least = f"{conversation.text}\n{text}", self.settings.described
        if self.settings.scope == "conversation":
            named = self.index.named(whole)
        else:
            named = spoken_of(conversation, f"{conversation.asked}\n{text}", self.index)
        about = self.index.stated(self.index.said(whole))
        return named | {t for t in stated if (least and about[t] >= least) or self.index.alone(t)}

    def _hits(self, stated: dict[str, int], meant: set[str]) -> list[Hit]:
        return [Hit(t, float(n)) for t, n in stated.items() if t in meant]


def spoken_of(conversation: Conversation, text: str, index: FactIndex) -> set[str]:
    """Targets that a text names: by a name, by an alias from the conversation, or by a pronoun for one named there."""
    told = conversation.text
    found = index.subjects.find(told)
    held = words(text)
    if _PRONOUNS & set(held):
        return index.named(text) | {m.target for m in found}
    letters = {"".join(held[i:j]) for i in range(len(held)) for j in range(i + 1, min(i + 4, len(held) + 1))}
    letters |= {stem(w) for w in letters}
    return index.named(text) | {t for t, names in aliases(told, found).items() if names & letters}
