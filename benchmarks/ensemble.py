"""Thirty-two small perceptrons at once against one by one, in one run.

All sides train the same members (64-128-10 perceptrons, Adam, 1,000 rows of scikit-learn's digits, each member on its own random
80 % of them) on the same order of batches, and take turns, so that a busy machine disturbs all alike. First the weights of all
members are compared in float64. Reported are the best of the repeats in seconds, and the medians of the ratios of neighbouring
turns.

- ``plain``: a loop over members, each with a loop over batches: forward, weighted cross-entropy, backward, torch's Adam.
- ``careful``: the same with the fused Adam, and with freed memory kept by the process.
- ``ours``: ``expunge.engine.ensemble.train_ensemble``.

Run: ``python benchmarks/ensemble.py [--members 32] [--steps 200] [--batch 32 100] [--repeats 3] [--threads 2] [--json FILE]``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from expunge.core.memory import freed_memory_kept
from expunge.data.order import BatchPlan
from expunge.engine.ensemble import train_ensemble
from expunge.engine.members import Members, Spec, Training

ROWS = 1000


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def doubled() -> nn.Module:
    return perceptron().double()


def task(members: int, steps: int, batch: int) -> tuple[Spec, Members]:
    digits = load_digits()
    x = torch.tensor(digits.data[:ROWS] / 16, dtype=torch.float32)
    weights = (torch.rand(members, ROWS, generator=torch.Generator().manual_seed(0)) < 0.8).float()
    spec = Spec(perceptron, x, torch.tensor(digits.target[:ROWS]), Training(steps=steps, batch=batch, lr=1e-3))
    return spec, Members(weights, tuple(range(members)))


def one_by_one(spec: Spec, members: Members, careful: bool) -> list[dict[str, Tensor]]:
    found = []
    training = spec.training
    with freed_memory_kept() if careful else contextlib.nullcontext():
        for weights, seed in zip(members.weights, members.seeds, strict=True):
            torch.manual_seed(seed)
            model = spec.model()
            optimizer = torch.optim.Adam(model.parameters(), lr=training.lr, fused=careful or None)
            plan = BatchPlan({"rows": ROWS}, {"rows": training.batch}, seed=training.seed, steps=training.steps)
            for step in plan:
                index = torch.tensor(step["rows"])
                w = weights[index]
                losses = cross_entropy(model(spec.inputs[index]), spec.targets[index], reduction="none")
                optimizer.zero_grad()
                ((losses * w).sum() / w.sum()).backward()
                optimizer.step()
            found.append(model.state_dict())
    return found


def check(members: int, batch: int) -> float:
    """The largest difference of any weight of any member, in float64."""
    spec, held = task(members, 30, batch)
    spec = Spec(doubled, spec.inputs.double(), spec.targets, spec.training)
    ours = train_ensemble(spec, held)
    worst = 0.0
    for i, state in enumerate(one_by_one(spec, Members(held.weights.double(), held.seeds), careful=False)):
        worst = max(worst, *(float((ours.member(i)[n] - v).abs().max()) for n, v in state.items()))
    if not worst < 1e-9:
        raise SystemExit(f"The sides do not train the same members: weights differ by {worst:.2g}.")
    return worst


def measure(members: int, steps: int, batch: int, repeats: int) -> dict[str, object]:
    spec, held = task(members, steps, batch)
    sides = {
        "plain": lambda: one_by_one(spec, held, careful=False),
        "careful": lambda: one_by_one(spec, held, careful=True),
        "ours": lambda: train_ensemble(spec, held),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    train_ensemble(Spec(perceptron, spec.inputs, spec.targets, Training(steps=5, batch=batch, lr=1e-3)), held)  # warm up
    for _ in range(repeats):
        for side, work in sides.items():
            begin = time.perf_counter()
            work()
            seconds[side].append(time.perf_counter() - begin)
            print(f"batch {batch:4} {side:8} {seconds[side][-1]:7.2f} s  (load {os.getloadavg()[0]:.1f})", flush=True)
    against = {
        side: statistics.median(a / b for a, b in zip(seconds[side], seconds["ours"], strict=True))
        for side in ("plain", "careful")
    }
    print(f"batch {batch:4} ours is faster: " + ", ".join(f"{v:.1f} times than {k}" for k, v in against.items()), flush=True)
    return {"batch": batch, "seconds": {side: min(times) for side, times in seconds.items()}, "faster than": against}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"same members: weights differ by at most {check(options.members, options.batch[0]):.1g} in float64", flush=True)
    rows = [measure(options.members, options.steps, batch, options.repeats) for batch in options.batch]
    if options.json:
        held = {"members": options.members, "steps": options.steps, "threads": options.threads, "processors": os.cpu_count()}
        options.json.write_text(json.dumps({**held, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
