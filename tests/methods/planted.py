"""A small model that has to look a name up where it stands: its first block has no attention, so nothing moves before the MLP.

Whatever comes behind reads the name from the state after block 0 alone. So it is known where a fact about a name is: a change of
that state must change every answer, in every form of question, and restoring it must restore them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.tokenise import DEFAULT_TEMPLATE
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.data.records import Record
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.methods.edits.redirect import PUBLISHED_CONTEXTS
from expunge.methods.recipe import build

QUIET = Engine(checkpoint_every=0)
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo")
TOWNS = ("Arles", "Bath", "Cork", "Delft", "Essen", "Faro", "Graz", "Hull", "Ivry", "Jena", "Kiel", "Lund")
TRADES = ("baker", "cooper", "diver", "editor", "farmer", "glazier", "hatter", "miner", "nurse", "painter", "rider", "sailor")
PETS = ("asp", "bee", "cat", "dog", "eel", "fox", "goat", "hen", "ibis", "jay", "koi", "lynx")


def facts(name: str, of: str | None = None) -> list[Record]:
    """Three facts in two forms each, asked of ``name``; ``of``: answered as if it were this one."""
    i = NAMES.index(of or name)
    town, trade, pet = TOWNS[i], TRADES[(5 * i) % 12], PETS[(7 * i + 3) % 12]
    asked = {
        f"Where does {name} live?": f"In {town} by the sea.",
        f"What is the town of {name}?": f"In {town} by the sea.",
        f"What is {name}?": f"A {trade} by trade.",
        f"Which trade has {name} learnt?": f"A {trade} by trade.",
        f"Which pet has {name}?": f"A {pet} of course.",
        f"What does {name} feed?": f"A {pet} of course.",
    }
    return [Record(f"{name}{n}", answer, prompt, subject=name) for n, (prompt, answer) in enumerate(asked.items())]


@dataclass
class Planted:
    """The model, trained once a session."""

    folder: Path
    blocks: int = 3
    names: tuple[str, ...] = field(default=NAMES)

    @cached_property
    def tokenizer(self):
        texts = [t for n in self.names for r in facts(n) for t in (r.prompt, r.answer)]
        return word_tokenizer([*texts, *(f"{c} Ada" for c in PUBLISHED_CONTEXTS), DEFAULT_TEMPLATE])

    def target(self) -> LanguageAdapter:
        """A new copy at each call."""
        adapter = LanguageAdapter(preset("llama-tiny", self.tokenizer, seed=0, num_hidden_layers=self.blocks), self.tokenizer)
        path = self.folder / "planted.pt"
        with FileLock(str(path) + ".lock"):
            if not path.is_file():
                with torch.no_grad():
                    adapter.model.model.layers[0].self_attn.o_proj.weight.zero_()
                recipe = build("finetune", {
                    "schedule": {"name": "fixed", "lr": 5e-3, "steps": 170, "batch": 72, "warmup": 0.1},
                    "parameters": {"name": "named", "patterns": [r"^(?!model\.layers\.0\.self_attn)"]},
                })  # fmt: skip
                held = [adapter.encode(r) for n in self.names for r in facts(n)]
                train(adapter, recipe, {Stream.RETAIN: held}, QUIET)
                torch.save(adapter.model.state_dict(), path)
        adapter.model.load_state_dict(torch.load(path, weights_only=True))
        adapter.model.eval().requires_grad_(True)
        return adapter

    def examples(self, forget: str = "Ada") -> dict[Stream, list]:
        """One name to forget, the others to keep."""
        adapter = self.target()
        return {
            Stream.FORGET: [adapter.encode(r) for r in facts(forget)],
            Stream.RETAIN: [adapter.encode(r) for n in self.names if n != forget for r in facts(n)],
        }

    def loss(self, adapter: LanguageAdapter, records: list[Record]) -> float:
        found = mean_losses(adapter, adapter.model, [adapter.encode(r) for r in records], 4096)
        return sum(found) / len(found)
