"""What a deletion costs in a SISA of twenty shards, beside training all of it anew without the row.

64-128-10 perceptrons on scikit-learn's digits, Adam. For one and for several slices: train; then requests for one row each, drawn
at random over all rows, and one for a row of a first slice, the dearest place. At the end all checkpoints are compared, bit by
bit, with those of a training without the rows. Reported are row visits, which no machine changes, and seconds of the whole call,
as shares of the full training; a request may cost 1.3/20 of a training beside what loading the folder takes.

Run: ``python benchmarks/sisa.py [--shards 20] [--slices 1 5] [--steps 300] [--requests 10] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

from expunge.data.rows import table
from expunge.engine.members import Training
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.methods.prepared.sisa import SISA

LIMIT = 1.3


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def loading(method: SISA, source: Source, folder: Path) -> float:
    begin = time.perf_counter()
    method.load(source, folder)
    return time.perf_counter() - begin


def measure(source: Source, method: SISA, requests: int) -> dict[str, object]:
    names = np.random.default_rng(0).permutation(source.table.ids)[:requests].tolist()
    with tempfile.TemporaryDirectory() as base:
        folder, never = Path(base) / "run", Path(base) / "never"
        full = method.train(source, folder)
        first = next(n for n, s, r in Record.open(folder).plan["rows"] if r == 0 and n not in names)
        reports, times = [], []
        for name in [*names, first]:
            begin = time.perf_counter()
            reports.append(method.delete(source, folder, [name]))
            times.append(time.perf_counter() - begin)
        load = loading(method, source, folder)
        anew = method.train(source, never, without=[*names, first])
        same = all(
            p.read_bytes() == (never / p.relative_to(folder)).read_bytes() for p in (folder / "shards").rglob("*.safetensors")
        )
    if not same:
        raise SystemExit("The shards differ from those of a training without the rows.")
    visits = [r.row_visits / r.full_row_visits for r in reports]
    seconds = [t / anew.seconds for t in times]
    found = {
        "shards": method.shards,
        "slices": method.slices,
        "training seconds": [full.seconds, anew.seconds],
        "loading seconds": load,
        "mean share of visits": statistics.mean(visits[:-1]),
        "share of visits, first slice": visits[-1],
        "median share of seconds": statistics.median(seconds[:-1]),
        "share of seconds, first slice": seconds[-1],
    }
    print(
        f"{method.shards} shards, {method.slices} slices: training {anew.seconds:.1f} s; a deletion reads "
        f"{100 * statistics.mean(visits[:-1]):.2f} % of the rows (first slice {100 * visits[-1]:.2f} %) and takes "
        f"{100 * statistics.median(seconds[:-1]):.2f} % of the time (first slice {100 * seconds[-1]:.2f} %), loading included; "
        f"loading alone takes {load:.2f} s; allowed are {100 * LIMIT / method.shards:.2f} %  (load {os.getloadavg()[0]:.1f})",
        flush=True,
    )
    if max(visits) * method.shards > LIMIT:
        raise SystemExit("A deletion reads more rows than allowed.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--slices", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    inputs, targets = load_digits(return_X_y=True)
    source = Source(table(inputs / 16, targets), perceptron, Training(steps=options.steps, batch=32, lr=1e-3))
    rows = [measure(source, SISA(shards=options.shards, slices=r), options.requests) for r in options.slices]
    if options.json:
        held = {"rows": len(targets), "steps": options.steps, "batch": 32, "processors": os.cpu_count(), "runs": rows}
        options.json.write_text(json.dumps(held, indent=2) + "\n")


if __name__ == "__main__":
    main()
