"""A tiny diffusion model that draws shapes, and a network that tells them apart; trained once a session."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from sklearn.neural_network import MLPClassifier

from expunge.adapters.diffusion import DiffusionAdapter
from expunge.core.access import Stream
from expunge.data.records import RecordSet
from expunge.data.rows import Row, Table
from expunge.data.sets.drawn import drawn_shapes
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.alternatives import alternatives, kind_for
from expunge.methods.recipe import build

TRAINING = {"name": "fixed", "lr": 5e-3, "steps": 300, "batch": 16, "warmup": 0.05, "decay": "cosine", "weight_decay": 0}
QUIET = Engine(checkpoint_every=0)
EACH = 32  #: pictures drawn of each class when a model is judged


def network(seed: int = 0, **other):
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    shape = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
        "norm_num_groups": 8,
        "num_class_embeds": 4,
    }
    return UNet2DModel(**{**shape, **other})


def scheduler(**other):
    from diffusers import DDPMScheduler

    return DDPMScheduler(**{"num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2", **other})


def fresh(seed: int = 0, draws: int = 2) -> DiffusionAdapter:
    return DiffusionAdapter(network(seed), scheduler(), ["ring", "square", "cross", "triangle"], draws=draws)


@dataclass
class Drawings:
    """100 pictures of each of four shapes; crosses are to be forgotten."""

    folder: Path
    forgotten: str = "cross"

    @cached_property
    def table(self) -> Table:
        return drawn_shapes(100)

    def split(self) -> tuple[RecordSet[Row], RecordSet[Row]]:
        """Rows of the class to forget, and all others."""
        chosen = self.table.select(classes=[self.forgotten])
        return self.table.rows(chosen, "forget"), self.table.rows(self.table.others(chosen), "retain")

    def target(self) -> DiffusionAdapter:
        """A model that has learnt all of them."""
        path = self.folder / "drawings-target"
        with FileLock(str(self.folder / "drawings.lock")):
            if not path.is_dir():
                adapter = fresh()
                rows = [adapter.encode(r) for r in self.table.rows()]
                train(adapter, build("finetune", {"schedule": TRAINING}), {Stream.RETAIN: rows}, QUIET)
                adapter.save(path)
        return DiffusionAdapter.load(path)

    def examples(self, adapter: DiffusionAdapter, name: str = "custom") -> dict[Stream, list]:
        """The pictures of both sides, with other classes as method ``name`` draws them."""
        forget, retain = self.split()
        found = {Stream.FORGET: [adapter.encode(r) for r in forget], Stream.RETAIN: [adapter.encode(r) for r in retain]}
        how = kind_for(name, "auto", forget)
        if how in ("other", "any"):
            others = alternatives(forget, how, classes=4)
            found[Stream.ALTERNATIVE] = [
                adapter.encode(r, answer=c, suffix="#alternative") for r, c in zip(forget, others, strict=True)
            ]
        return found

    @cached_property
    def judge(self) -> MLPClassifier:
        """Tells shapes apart, under some noise too; on pictures that no diffusion model has seen."""
        held = drawn_shapes(300, seed=5)
        inputs = held.inputs.reshape(len(held), -1)
        noise = np.random.default_rng(0).normal(scale=0.2, size=inputs.shape)
        return MLPClassifier((64,), random_state=0, max_iter=200).fit(np.clip(inputs + noise, -1, 1), held.targets)

    def judged(self, adapter: DiffusionAdapter, seed: int = 1) -> np.ndarray:
        """Of each class asked for (rows), the shares of what the judge sees in the drawings (columns), ``[4, 4]``."""
        classes = np.repeat(np.arange(4), EACH)
        seen = self.judge.predict(adapter.draw(classes, seed=seed, steps=25).reshape(len(classes), -1))
        shares = np.zeros((4, 4))
        np.add.at(shares, (classes, seen), 1 / EACH)
        return shares

    def forgotten_and_kept(self, adapter: DiffusionAdapter) -> tuple[float, float]:
        """How often the forgotten class is seen where it was asked for, and how often, on average, the others are."""
        shares = self.judged(adapter).diagonal()
        own = self.table.classes.index(self.forgotten)
        return float(shares[own]), float(np.delete(shares, own).mean())
