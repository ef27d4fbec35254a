"""Answers that a language model writes in the place of those to be forgotten."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.core.files import digest_json, write_json
from expunge.data.records import Record
from expunge.engine.gradients import fitting
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.registry import preparation

INSTRUCTION = (
    "You must not answer questions about {task}. This is such a question: {prompt}\n"
    "First explain in two or three sentences why it belongs to what you must not answer, without repeating what it asks for. "
    "Then refuse politely, and offer help with something else."
)


@preparation
class WrittenAnswers(Preparation):
    """A reason and a refusal for each forget prompt, written by a model that reasons (TRU, arXiv 2603.09980).

    The model is asked with the prompt and a name of what is to be forgotten; what it writes is the answer that is taught. With
    ``model`` none the target writes them itself. The texts are kept beside the checkpoint, so a run that goes on asks nothing
    again. A model behind an interface cannot be asked here: have it write the answers first, and give them as a column
    ``alternatives``.
    """

    name: ClassVar[str] = "written-answers"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET,)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.ALTERNATIVE})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.SEQUENCE, Offer.TEXT, Offer.GENERATE})

    task: str = Field(min_length=1, description="what is to be forgotten, in words that complete 'questions about ...'")
    model: str | None = Field(None, description="hub id or local folder of the model that writes; none: the target")
    instruction: str = Field(INSTRUCTION, description="what it is told, with {task} and {prompt} where they belong")
    tokens: int = Field(160, ge=1, description="longest answer in tokens")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Have the answers written, or read them.

        Raises:
            InputError: the instruction lacks a field, the model cannot be loaded, or it writes nothing.
        """
        forget = examples[Stream.FORGET]
        for field in ("{task}", "{prompt}"):
            if field not in self.instruction:
                raise InputError(f"preparation.instruction lacks {field}.", "Put it where it belongs.")
        asked = [self._ask(adapter.decode(e.data.ids[: e.data.start].tolist())) for e in forget]
        path = scratch / f"written-{digest_json([self.model_dump(mode='json'), adapter.fingerprint(), asked])[:24]}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self._written(adapter, forget, asked, engine, tell))
        texts: list[str] = json.loads(path.read_text(encoding="utf-8"))
        made = [adapter.replace(e, answer=text, suffix="#written") for e, text in zip(forget, texts, strict=True)]
        return Prepared({Stream.ALTERNATIVE: made})

    def _ask(self, prompt: str) -> str:
        return self.instruction.replace("{task}", self.task).replace("{prompt}", prompt)

    def _written(
        self, adapter: Adapter, forget: Sequence[Example], asked: Sequence[str], engine: Engine, tell: Tell | None
    ) -> list[str]:
        writer = adapter if self.model is None else _opened(self.model, adapter)
        questions = [writer.encode(Record(e.id, "-", text)) for e, text in zip(forget, asked, strict=True)]
        found: dict[str, str] = {}
        for part in fitting(questions, engine.max_tokens):
            found |= {g.id: g.text for g in writer.generate(writer.model, part, self.tokens)}
            if tell is not None:
                tell(len(found), len(questions), "writing answers to be taught")
        bare = [name for name, text in found.items() if not text]
        if bare:
            raise InputError(
                f"The model wrote no answer to {bare[0]!r}.", "Change preparation.instruction, or give answers as alternatives."
            )
        return [found[e.id] for e in forget]


def _opened(source: str, adapter: Adapter) -> Any:
    from expunge.adapters.loading import load

    device = next(adapter.model.parameters()).device
    held = load(source, device=device)
    held.model.eval()
    return held
