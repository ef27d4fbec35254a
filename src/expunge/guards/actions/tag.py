"""The in-context instruction to forget, put before the question by the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.tags import FORGOT, OPEN, tagged, untagged
from expunge.guards.conversation import Conversation, Message
from expunge.guards.folding import words
from expunge.guards.parts import Action, Doer, Hit, Hook, Material, Orders, action
from expunge.guards.target import Shown, Target

_TEACH = "Teach it first: expunge unlearn MODEL --method in-context-teaching."


@action
class Tag(Action):
    """A tag that names what is to be forgotten, for a model that was taught to obey it (Takashiro et al. 2024, arXiv 2410.00382).

    Only the server writes tags: those in any turn are taken out first. The tag holds names of the targets that were noticed, or
    the answers of their examples that are most like the question, as the model was taught; few, for a model is taught with one.
    Teaching: the method ``in-context-teaching``. A model that does not know the tag is refused, and so is one that knows it and
    says to none of a few tagged questions that it forgot.
    """

    name: ClassVar[str] = "tag"
    title: ClassVar[str] = "Tag that names what is to be forgotten"
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST})
    rewrites: ClassVar[bool] = True

    holds: Literal["names", "answers"] = Field("names", description="what the model was taught that a tag holds")
    limit: int = Field(1, ge=1, le=20, description="how many of these at most")

    check: int = Field(3, ge=0, le=100, description="tagged questions of targets that are asked first; 0: none")
    says: str = Field(FORGOT, min_length=1, description="what the model was taught to say of what is forgotten")

    def prepare(self, material: Material) -> Doer:
        """Hold names and examples.

        Raises:
            InputError: the model does not know the tag or does not obey it, or a target has nothing that it could hold.
        """
        if material.adapter is not None and OPEN not in material.adapter.tokenizer.get_vocab():
            raise InputError("The model was not taught the tag: its tokenizer lacks it.", _TEACH)
        made = _Tags(self)
        for target in material.targets:
            made.add(target)
        if material.adapter is not None:
            self._try(made, material)
        return made

    def _try(self, made: _Tags, material: Material) -> None:
        """Ask a few tagged questions, of as many targets as there are."""
        shown = [(t, t.examples[at]) for at in range(self.check) for t in material.targets if at < len(t.examples)][: self.check]
        if not shown:
            return
        adapter = material.model(type(self).title)
        asked = [made.orders(Conversation.of(e.prompt), [Hit(t.id, 1.0)]).conversation for t, e in shown]
        records = [Record(f"tagged {n}", "-", c.asked) for n, c in enumerate(asked) if c is not None]
        said = adapter.generate(adapter.model, [adapter.encode(r) for r in records], 16)
        if not any(g.text.casefold().startswith(self.says.casefold()) for g in said):
            asked_of = f"to none of {len(said)} tagged questions it said {self.says!r}"
            raise InputError(f"The model knows the tag and does not obey it: {asked_of}.", _TEACH)


class _Tags(Doer):
    def __init__(self, settings: Tag) -> None:
        self.settings = settings
        self.held: dict[str, Target] = {}

    def add(self, target: Target) -> None:
        if not (target.entities if self.settings.holds == "names" else target.examples):
            kind = "entities" if self.settings.holds == "names" else "examples"
            raise InputError(f"The tag is made of {self.settings.holds}, and the target has no {kind}.", "Give some.")
        self.held = {**self.held, target.id: target}

    def drop(self, target: str) -> None:
        self.held = {k: v for k, v in self.held.items() if k != target}

    def orders(self, conversation: Conversation, hits: Sequence[Hit]) -> Orders:
        noticed = [self.held[h.target] for h in hits if h.target in self.held]
        if self.settings.holds == "names":
            said = [t.entities[0] for t in noticed]
        else:
            said = [e.answer for e in nearest(conversation.asked, [e for t in noticed for e in t.examples])]
        bare = Conversation(tuple(Message(m.role, untagged(m.content)) for m in conversation.messages))
        kept = list(dict.fromkeys(s for s in said if s))[: self.settings.limit]
        return Orders(conversation=bare.asking(tagged(bare.asked, "; ".join(kept)))) if kept else Orders()


def nearest(question: str, examples: Sequence[Shown]) -> list[Shown]:
    """Examples by the share of words that their questions have in common with another one, the likest first."""
    asked = set(words(question))

    def likeness(shown: Shown) -> float:
        held = set(words(shown.prompt))
        return len(asked & held) / max(1, len(asked | held))

    return sorted(examples, key=lambda e: -likeness(e))
