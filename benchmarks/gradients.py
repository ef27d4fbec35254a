"""Gradients per row, and importances of weights: vectorised against loops, in one run.

A small convolutional network (two convolutions, one linear layer) on 1,000 rows of scikit-learn's digits. The sides take turns,
and each pair is first compared on some rows. Reported are the best of the repeats in seconds, and medians of the ratios.

- gradients: the gradient of each row's loss, by ``per_example_gradients`` against one backward pass per row.
- fisher: ``sum_y p_y (d log p_y)^2`` by ``diagonal_importance(labels="model")`` against one backward pass per row and class,
  and ``labels="sampled"``, which needs one backward pass whatever the number of classes is.
- ssd: the square of the mean gradient of batches of 64 rows, which is one ordinary pass; its seconds at 10 and at 100 classes
  show what the number of classes costs.

Run: ``python benchmarks/gradients.py [--rows 1000] [--repeats 3] [--threads 2] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from expunge.engine.importance import diagonal_importance, per_example_gradients

BATCH = 64


def network(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, classes),
    ).eval()  # fmt: skip


def loop_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One backward pass per row."""
    names = [n for n, _ in model.named_parameters()]
    held = {n: torch.empty(len(x), *p.shape) for n, p in model.named_parameters()}
    for i in range(len(x)):
        loss = cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        for name, gradient in zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            held[name][i] = gradient
    return held


def loop_fisher(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One backward pass per row and class."""
    parameters = dict(model.named_parameters())
    held = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for i in range(len(x)):
        logs = model(x[i : i + 1]).log_softmax(1)[0]
        for log in logs:
            for name, gradient in zip(held, torch.autograd.grad(log, list(parameters.values()), retain_graph=True), strict=True):
                held[name] += log.detach().exp() * gradient**2 / len(x)
    return held


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def our_fisher(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return diagonal_importance(model, batches(x, y), estimator="sample", labels="model")


def our_sampled(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return diagonal_importance(model, batches(x, y), estimator="sample", labels="sampled")


def our_ssd(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return diagonal_importance(model, batches(x, y))


def check(x: Tensor, y: Tensor) -> None:
    """Both sides of each pair are the same on some rows, in float64."""
    model, x, y = network().double(), x[:20].double(), y[:20]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for ours, theirs in ((per_example_gradients, loop_gradients), (our_fisher, loop_fisher)):
        found, expected = ours(model, x, y), theirs(model, x, y)
        worst = max(float((found[n] - v.detach()).abs().max()) for n, v in expected.items())
        if not worst < 1e-10:
            raise SystemExit(f"{theirs.__name__} and ours differ by {worst:.2g}.")
        print(f"same as {theirs.__name__}: at most {worst:.1g} apart in float64", flush=True)
    torch.set_default_dtype(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    digits = load_digits()
    x = torch.tensor(digits.images[: options.rows] / 16, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target[: options.rows])
    check(x, y)
    ten, hundred = network(10), network(100)
    sides: dict[str, Callable[[], object]] = {
        "gradients, loop": lambda: loop_gradients(ten, x, y),
        "gradients, ours": lambda: per_example_gradients(ten, x, y),
        "fisher, loop": lambda: loop_fisher(ten, x, y),
        "fisher, ours": lambda: our_fisher(ten, x, y),
        "fisher, ours, drawn labels": lambda: our_sampled(ten, x, y),
        "fisher, ours, drawn labels, 100 classes": lambda: our_sampled(hundred, x, y),
        "ssd, ours": lambda: our_ssd(ten, x, y),
        "ssd, ours, 100 classes": lambda: our_ssd(hundred, x, y),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for side, work in sides.items():
        if "ours" in side:
            work()  # warm up
    for _ in range(options.repeats):
        for side, work in sides.items():
            begin = time.perf_counter()
            work()
            seconds[side].append(time.perf_counter() - begin)
    for side, times in seconds.items():
        print(f"{side:42} {min(times):8.3f} s", flush=True)
    pairs = {"gradients": "gradients, loop", "fisher": "fisher, loop"}
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[loop], seconds[f"{name}, ours"], strict=True))
        for name, loop in pairs.items()
    }
    print(", ".join(f"{name}: {value:.1f} times faster" for name, value in ratios.items()) + f"  (load {os.getloadavg()[0]:.1f})")
    if options.json:
        held = {"rows": options.rows, "threads": options.threads, "processors": os.cpu_count()}
        best = {side: min(times) for side, times in seconds.items()}
        options.json.write_text(json.dumps({**held, "seconds": best, "times faster": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
