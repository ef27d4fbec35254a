"""A language model that is only served: it answers in words, and nothing else is had of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from torch import Tensor, nn

from expunge.adapters.answers import Generation
from expunge.adapters.base import Adapter, Batch, Example, Outputs
from expunge.adapters.endpoint import CHAT, TEXT, Asker, Reply
from expunge.adapters.generation import Draws
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.tokenise import Encoder, Tokens
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.data.records import Record

_ONLY_ASKED = "A model that is served can only be asked."


@dataclass(frozen=True)
class Question(Tokens):
    """Tokens of a record, by the tokenizer of the models that the served one is compared with, and what the server is sent.

    Attributes:
        turns: of a chat, pairs of role and text.
        text: to be completed, where there are no turns.
    """

    turns: tuple[tuple[str, str], ...] = ()
    text: str = ""


class ServedAdapter(LanguageAdapter):
    """A model behind the common interface of chat servers.

    Answers are put into tokens by the tokenizer of the models that it is compared with, so that all are cut at the same length.
    Each question is put once a run. Greedy means temperature 0: a server may still answer otherwise the next time.

    Args:
        asker: asks the server.
        tokenizer: of the models that it is compared with.
        template: of those models, where their tokenizer has no chat template; see :class:`~expunge.adapters.tokenise.Encoder`.
    """

    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE})
    lasting: ClassVar[bool] = False
    fronted: ClassVar[bool] = True

    def __init__(self, asker: Asker, tokenizer: Any, *, template: str | None = None) -> None:
        self.asker, self.tokenizer, self.template = asker, tokenizer, template
        self.model: Any = nn.Module()
        self.fused, self.context = False, None
        self._encoder = Encoder(tokenizer, template, None, False)
        self.end_ids = frozenset(self._encoder.end_ids())

    @property
    def templated(self) -> bool:
        """Whether conversations of several turns are sent as such."""
        return self.asker.endpoint.form != "completions" or self._encoder.chat

    # ---- what is asked

    def encode(self, record: Record, *, answer: str | None = None, suffix: str = "", prompt: str | None = None) -> Example:
        """See :meth:`LanguageAdapter.encode`; of what the server is sent only the words are the record's own.

        Raises:
            InputError: nothing to supervise, or a chat that cannot be written as a text where the server is sent texts.
        """
        form = self.asker.endpoint.form
        turns = record.messages or (("user", record.prompt),)
        if prompt is not None:
            turns = (*turns[:-1], (turns[-1][0], prompt))
        going_on = record.is_text or record.lead or (record.verbatim and not record.messages)
        as_chat = form == "chat" or (form == "auto" and not going_on)
        plain = record
        if as_chat and len(turns) > 1 and not self._encoder.chat:  # no template can write it; the server's own will
            plain = Record(record.id, record.answer, prompt="\n\n".join(t for _, t in turns), subject=record.subject)
        made = super().encode(plain, answer=answer, suffix=suffix, prompt=prompt if plain is record else None)
        held: Tokens = made.data
        said: dict[str, Any] = {"turns": turns} if as_chat else {"text": self._encoder.opening(record, prompt)}
        asked = Question(held.ids, held.start, held.ends, held.marked, held.favoured, **said)
        return Example(
            made.id, made.cluster, made.n_targets, made.size, asked, n_marked=made.n_marked, n_favoured=made.n_favoured
        )

    def _question(self, example: Example) -> tuple[str, dict[str, Any]]:
        """Route and words of a question.

        Raises:
            InputError: it has none.
        """
        held: Tokens = example.data
        turns = held.turns if isinstance(held, Question) else ()
        if turns:
            return CHAT, {"messages": [{"role": role, "content": text} for role, text in turns]}
        # A prompt that an attack has made of tokens is sent as their text.
        text = held.text if isinstance(held, Question) else self.decode(held.ids[: held.start].tolist())
        if not text.strip():
            raise InputError(f"The record {example.id!r} has no prompt that could be sent.", "Give questions, not plain texts.")
        return (TEXT, {"prompt": text}) if self.asker.endpoint.form != "chat" else (CHAT, {"messages": _alone(text)})

    def generate(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int) -> list[Generation]:
        """The server's answers at temperature 0; those that something gives in the model's place are answers like others."""
        return self._made(examples, self.asker.ask([self._question(e) for e in examples], max_new_tokens), max_new_tokens)

    def drawn(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int, draws: Draws) -> list[Generation]:
        """Answers at the temperature of the draws; the server draws by itself, from a seed that follows from the numbers."""
        asked = [self._question(e) for e in examples]
        seeds = [int(float(numbers[0]) * 2**31) for numbers in np.asarray(draws.uniforms)]
        drawing = [
            (route, {**said, "temperature": draws.temperature, "seed": seed})
            for (route, said), seed in zip(asked, seeds, strict=True)
        ]
        return self._made(examples, self.asker.ask(drawing, max_new_tokens), max_new_tokens)

    def _made(self, examples: Sequence[Example], replies: Sequence[Reply], limit: int) -> list[Generation]:
        out = []
        for example, reply in zip(examples, replies, strict=True):
            tokens = tuple(self._encoder.spell(reply.text))
            short = len(tokens) <= limit
            text = reply.text if short else self.decode(tokens[:limit])
            out.append(Generation(example.id, tokens[:limit], text, reply.ended and short, reply.refused))
        return out

    # ---- what is not had

    def forward(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """Not to be had.

        Raises:
            InputError: always.
        """
        _refuse()

    def logit_blocks(self, model: nn.Module, batch: Batch, rows: int = 512) -> Iterator[tuple[int, Tensor]]:
        """Not to be had.

        Raises:
            InputError: always.
        """
        _refuse()

    def sample(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int, temperature: float) -> list[Generation]:
        """Not to be had: methods train on such answers, and this model cannot be trained.

        Raises:
            InputError: always.
        """
        _refuse()

    def layers(self) -> list[str]:
        """None that anybody sees."""
        return []

    def parts(self) -> dict[str, Adapter]:
        """None that anybody sees."""
        return {}

    def fingerprint(self) -> str:
        """Hash of address, model, form and of this run: of the weights behind it nothing is known, and they may change."""
        held = self.asker.endpoint
        return hashlib.sha256(json.dumps([held.url, held.model, held.form, self.asker.run]).encode()).hexdigest()

    def save(
        self, folder: Path, model: nn.Module | None = None, *, merge: bool = False, state: dict[str, Tensor] | None = None
    ) -> None:
        """Not to be had.

        Raises:
            InputError: always.
        """
        _refuse()

    def copy(self) -> LanguageAdapter:
        """Not to be had: there is no second model to be changed.

        Raises:
            InputError: always.
        """
        _refuse()


def _refuse() -> NoReturn:
    raise InputError(_ONLY_ASKED, "Audit it with access=text.")


def _alone(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
