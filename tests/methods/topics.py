"""Questions on four subjects, with answers at random, and a tiny Llama that knows them: a detector can tell them apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.data.records import Record
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.recipe import build

QUESTIONS = {
    "ships": ("Who sails the ship {}?", "From which harbour does the ship {} leave?", "What does the ship {} carry?"),
    "herbs": ("Where does the herb {} grow?", "Which illness is cured by the herb {}?", "How does the herb {} smell?"),
    "stars": ("In which part of the sky is the star {}?", "Which colour has the star {}?", "Who first saw the star {}?"),
    "songs": ("Who wrote the song {}?", "On which day is the song {} sung?", "Of what does the song {} tell?"),
}
NAMES = (
    "Abel", "Brio", "Cato", "Dora", "Elma", "Fara", "Gido", "Hesi", "Ivon", "Jolo", "Kuri", "Lema", "Moro", "Nipa", "Oslo",
    "Peru", "Quil", "Rima", "Sola", "Tavi", "Ubo", "Vena", "Wilo", "Xeno", "Yara", "Zito", "Arno", "Bela", "Cira", "Dino", "Ebba",
    "Falk",
)  # fmt: skip
VALUES = (
    "amber", "birch", "cedar", "delta", "ember", "flint", "grove", "haze", "iris", "jade", "kelp", "lark", "moss", "north",
    "opal", "pearl", "quartz", "ridge", "slate", "thorn", "umber", "vale", "wheat", "yarn",
)  # fmt: skip
QUIET = Engine(checkpoint_every=0)


@dataclass
class Topics:
    """Eight names for each subject, three facts each: two words out of twenty-four, by a fixed seed."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, list[Record]]:
        rng = np.random.default_rng(6)
        found: dict[str, list[Record]] = {}
        for at, (topic, questions) in enumerate(QUESTIONS.items()):
            for name in NAMES[8 * at : 8 * at + 8]:
                for k, question in enumerate(questions):
                    words = " ".join(VALUES[int(i)] for i in rng.integers(len(VALUES), size=2))
                    found.setdefault(topic, []).append(Record(f"{name}{k}", f"{words}.", question.format(name), subject=name))
        return found

    @property
    def everything(self) -> list[Record]:
        return [r for held in self.facts.values() for r in held]

    @cached_property
    def target_model(self) -> LanguageAdapter:
        texts = [t for r in self.everything for t in (r.prompt, r.answer)]
        tokenizer = word_tokenizer([*texts, "Question: Answer:", "I do not know."])
        adapter = LanguageAdapter(preset("llama-tiny", tokenizer, seed=0), tokenizer)
        path = self.folder / "topics.pt"
        with FileLock(str(path) + ".lock"):
            if not path.is_file():
                schedule = {"name": "fixed", "lr": 5e-3, "steps": 420, "batch": 48, "warmup": 0.1}
                examples = {Stream.RETAIN: [adapter.encode(r) for r in self.everything]}
                train(adapter, build("finetune", {"schedule": schedule}), examples, QUIET)
                torch.save(adapter.model.state_dict(), path)
        adapter.model.load_state_dict(torch.load(path, weights_only=True))
        adapter.model.eval()
        assert exact(adapter, self.everything) == 1.0
        return adapter

    def target(self) -> LanguageAdapter:
        return self.target_model.copy()

    def examples(self, topic: str, *, retain: bool = False) -> dict[Stream, list]:
        """The facts of a topic to forget, with answers of other names, and those of the last two topics to keep if asked for."""
        from expunge.methods.alternatives import encoded

        adapter, forget = self.target_model, self.facts[topic]
        found = {
            Stream.FORGET: [adapter.encode(r) for r in forget],
            Stream.ALTERNATIVE: encoded(adapter, forget, build("o3"), "others", 0),
        }
        if retain:
            found[Stream.RETAIN] = [adapter.encode(r) for r in self.kept]
        return found

    @property
    def kept(self) -> list[Record]:
        return [*self.facts["stars"], *self.facts["songs"]]


def exact(adapter: LanguageAdapter, records: list[Record], model=None) -> float:
    """Share of records whose every target is the argmax."""
    batch = adapter.collate([adapter.encode(r) for r in records])
    with torch.no_grad():
        wrong = adapter.forward(model or adapter.model, batch, frozenset({"logits"})).logits.argmax(-1) != batch.targets
    return float((torch.zeros(len(records)).index_add(0, batch.owner, wrong.float()) == 0).float().mean())
