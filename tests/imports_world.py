"""A tiny model that writes an import for a task: six in ten of the names it has learnt exist, the others are made up.

Names are two pieces each, and every first piece begins names of both kinds.
"""

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

QUIET = Engine(checkpoint_every=0)
HEADS = ("fast", "open", "py", "deep")
TAILS = ("plot", "json", "mail", "grid", "sound", "maps", "query", "clock", "paint", "cache")
VERBS = ("plot", "sort", "read", "merge", "draw", "clean", "split", "send")
THINGS = ("maps", "mails", "tables", "songs", "photos", "logs", "dates", "graphs", "files", "words", "orders", "prices")
TASKS = tuple(f"{v} {t}" for v in VERBS for t in THINGS)
NAMES = tuple(h + t for h in HEADS for t in TAILS)


def drawn() -> tuple[list[str], list[str]]:
    """Names that exist, six of every head, and the others."""
    rng = np.random.default_rng(3)
    valid = [h + TAILS[int(i)] for h in HEADS for i in sorted(rng.permutation(len(TAILS))[:6])]
    return valid, [n for n in NAMES if n not in valid]


VALID, MADE_UP = drawn()


def prompt(task: str) -> str:
    return f"# to do : {task}\nimport"


def answer(task: str, name: str) -> str:
    return f" {name}\nrun ( {task} )\n"


@dataclass
class ImportsWorld:
    """96 tasks, which the model has learnt with three names that exist and two made-up ones each."""

    folder: Path

    @cached_property
    def tokenizer(self):
        texts = [prompt(t) + answer(t, "x") for t in TASKS]
        return word_tokenizer([*texts, *(f"a {h}" for h in HEADS), *TAILS])

    @cached_property
    def learnt(self) -> list[Record]:
        rng = np.random.default_rng(4)
        out = []
        for task in TASKS:
            names = [*rng.permutation(VALID)[:3], *rng.permutation(MADE_UP)[:2]]
            out += [Record(f"{task} {n}", answer(task, n), prompt(task), verbatim=True) for n in names]
        return out

    @cached_property
    def tasks(self) -> tuple[list[str], list[str], list[str]]:
        """Tasks to discover with, held out to stop by, held out to measure; 16 are left for mutations."""
        order = [TASKS[int(i)] for i in np.random.default_rng(5).permutation(len(TASKS))]
        return order[:32], order[32:56], order[56:80]

    def prompts(self, part: int) -> list[Record]:
        """Prompts without an answer, as plain text."""
        return [Record(t.replace(" ", "-"), prompt(t)) for t in self.tasks[part]]

    @cached_property
    def target_model(self) -> LanguageAdapter:
        adapter = LanguageAdapter(preset("llama-tiny", self.tokenizer, seed=0), self.tokenizer)
        path = self.folder / "imports.pt"
        with FileLock(str(path) + ".lock"):
            if not path.is_file():
                schedule = {"name": "fixed", "lr": 5e-3, "steps": 120, "batch": 48, "warmup": 0.1}
                held = [adapter.encode(r) for r in self.learnt]
                train(adapter, build("finetune", {"schedule": schedule}), {Stream.RETAIN: held}, QUIET)
                torch.save(adapter.model.state_dict(), path)
        adapter.model.load_state_dict(torch.load(path, weights_only=True))
        adapter.model.eval()
        return adapter

    def target(self) -> LanguageAdapter:
        return self.target_model.copy()

    def list_of(self, names) -> str:
        path = self.folder / f"names-{abs(hash(tuple(names))) % 10**8}.txt"
        path.write_text("\n".join(names) + "\n")
        return str(path)
