"""Handwritten digits (bundled with scikit-learn) and a small network that has learnt them; trained once a session."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter
from expunge.core.access import Stream
from expunge.data.records import RecordSet
from expunge.data.rows import Row, Table, table
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.alternatives import alternatives, kind_for
from expunge.methods.recipe import build

TRAINING = {"name": "fixed", "lr": 3e-3, "steps": 400, "batch": 100, "warmup": 0, "decay": "constant", "weight_decay": 0}
QUIET = Engine(checkpoint_every=0)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


@dataclass
class Digits:
    """1,000 rows to train on, 797 never seen; class 3 is to be forgotten."""

    folder: Path
    forgotten: str = "3"

    @cached_property
    def tables(self) -> tuple[Table, Table]:
        inputs, targets = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(inputs))
        inputs, targets = inputs[order] / 16, targets[order]
        seen = table(inputs[:1000], targets[:1000], ids=[f"train{i}" for i in range(1000)])
        return seen, table(inputs[1000:], targets[1000:], ids=[f"test{i}" for i in range(len(inputs) - 1000)])

    def split(self, which: int = 0) -> tuple[RecordSet[Row], RecordSet[Row]]:
        """Rows of the class to forget, and all others; of the training table (0) or the unseen one (1)."""
        held = self.tables[which]
        chosen = held.select(classes=[self.forgotten])
        return held.rows(chosen, "forget"), held.rows(held.others(chosen), "retain")

    def target(self) -> ClassifierAdapter:
        """A network trained on all rows."""
        return self._trained("target", self.tables[0].rows(), 0)

    def retrained(self, seed: int = 1) -> ClassifierAdapter:
        """One trained without the class."""
        return self._trained(f"retrained{seed}", self.split()[1], seed)

    def _trained(self, name: str, rows: RecordSet[Row], seed: int) -> ClassifierAdapter:
        adapter = ClassifierAdapter(network(seed), self.tables[0].classes)
        path = self.folder / f"digits-{name}" / "model.safetensors"
        with FileLock(str(self.folder / f"digits-{name}.lock")):
            if not path.is_file():
                train(adapter, build("finetune", {"schedule": TRAINING}), {Stream.RETAIN: encoded(adapter, rows)}, QUIET)
                adapter.save(path.parent)
        adapter.model.load_state_dict(load_file(path))
        return adapter

    def examples(self, adapter: ClassifierAdapter, name: str = "custom") -> dict[Stream, list]:
        """The training rows of both sides, with other classes as method ``name`` draws them."""
        forget, retain = self.split()
        how = kind_for(name, "auto", forget)
        found = {Stream.FORGET: encoded(adapter, forget), Stream.RETAIN: encoded(adapter, retain)}
        if how in ("other", "any"):
            others = alternatives(forget, how, classes=10)
            found[Stream.ALTERNATIVE] = [
                adapter.encode(r, answer=c, suffix="#alternative") for r, c in zip(forget, others, strict=True)
            ]
        return found


def encoded(adapter, rows) -> list:
    return [adapter.encode(r) for r in rows]


def accuracy(adapter: ClassifierAdapter, rows) -> float:
    batch = adapter.collate(encoded(adapter, rows))
    with torch.no_grad():
        logits = adapter.forward(adapter.model, batch, frozenset({"logits"})).logits
    return float((logits.argmax(1) == batch.targets).float().mean())
