"""``expunge demo classifier``: digits, a network that knows them, three requests, a dozen methods, one report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from expunge.audit.document import AuditDocument
from expunge.core.runs import Run
from expunge.data.rows import Indices, table
from expunge.engine.members import Training
from expunge.engine.options import Engine
from expunge.pipeline.audit import DOCUMENT
from expunge.pipeline.demo import Bars
from expunge.pipeline.row_audit import RowAuditConfig, originals
from expunge.pipeline.row_runs import RowsConfig
from expunge.pipeline.supervised import Supervised, target_of
from expunge.pipeline.workers import Job, run_jobs

ENTRY = "expunge.pipeline.demo_rows:digits"
TRAINED, WRONG, RANDOM = 1000, 50, 50  #: rows trained on; of these mislabelled; and to be forgotten at random
RETRAINED, REFERENCES = 4, 12

#: A dozen methods. Fine-tuning and l1-sparse run at the rate of the original training: hot enough to leave its weights behind.
_LIKE_TRAINING = {"name": "fixed", "lr": 1e-2, "epochs": None, "batch": 100, "warmup": 0, "decay": "constant", "clip": None}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "retrain": {"schedule": {**_LIKE_TRAINING, "steps": 600}},
    "finetune": {"schedule": {**_LIKE_TRAINING, "steps": 600}},
    "l1-sparse": {"schedule": {**_LIKE_TRAINING, "lr": 3e-3, "steps": 400}},
    "gradascent": {},
    "neggrad-plus": {},
    "npo": {},
    "random-label": {},
    "salun": {},
    "scrub": {},
    "bad-teacher": {},
    "ssd": {},
    "iau": {},
    "influence": {},
}


def network() -> nn.Module:
    """Two layers of 64-256-10."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def digits() -> Supervised:
    """scikit-learn's 8 x 8 digits: 1,000 rows to train on, 50 of them with a wrong label; the other 797 are never seen.

    The column ``mislabelled`` tells which. Row ids are positions in the data set.
    """
    from sklearn.datasets import load_digits

    held = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(held.target))
    inputs, labels = (held.data / 16).astype(np.float32), held.target.astype(np.int64)
    train, unseen = order[:TRAINED], order[TRAINED:]
    wrong = np.zeros(TRAINED, dtype=bool)
    wrong[rng.choice(TRAINED, WRONG, replace=False)] = True
    learnt = labels[train].copy()
    learnt[wrong] = (learnt[wrong] + rng.integers(1, 10, WRONG)) % 10
    classes = [str(c) for c in range(10)]
    return Supervised(
        data=table(
            inputs[train], learnt, classes=classes, ids=[str(i) for i in train], columns={"mislabelled": wrong}, source="digits"
        ),
        holdout=table(inputs[unseen], labels[unseen], classes=classes, ids=[str(i) for i in unseen], source="digits"),
        build=network,
        training=Training(steps=600, batch=100, lr=1e-2),
    )


def requests(problem: Supervised) -> dict[str, tuple[str, dict[str, Any]]]:
    """Title and choice of rows of the three requests, by folder name."""
    data = problem.data
    clean = np.flatnonzero(~data.columns["mislabelled"])
    drawn: Indices = np.sort(np.random.default_rng(1).choice(clean, RANDOM, replace=False))
    return {
        "random": (f"{RANDOM} rows drawn at random", {"ids": tuple(data.ids[i] for i in drawn)}),
        "class": ("every row of the class 3", {"classes": ("3",)}),
        "mislabelled": (f"{WRONG} rows that were learnt with a wrong label", {"where": "mislabelled"}),
    }


@dataclass(frozen=True)
class RowDemo:
    """What the demo leaves: one document for each request, its folder, and how long it took."""

    documents: list[AuditDocument]
    folder: Path
    seconds: float


def run(folder: Path, *, bars: Bars, say: Callable[[str], None], methods: Mapping[str, Mapping[str, Any]] = METHODS) -> RowDemo:
    """Train, unlearn by every method on every request, retrain, audit; what an earlier run in the folder has done is used again.

    Args:
        folder: gets one folder for each request with one run for each method, and ``audit.json`` in each.
        bars: makes a progress bar.
        say: told what is being done.
        methods: parts by method.
    """
    started = time.perf_counter()
    problem = digits()
    with bars("training") as bar:
        target_of(problem, progress=bar)
        originals(problem, REFERENCES, progress=bar)
    asked = requests(problem)
    for name, (title, choice) in asked.items():
        chosen = problem.data.select(**choice)
        say(f"{name}: {title} ({len(chosen)} of {len(problem.data)})")
        Run.start(folder / name, "demo", {"methods": {m: dict(p) for m, p in methods.items()}}, resume=_begun(folder / name))
    configs = {
        folder / name / m: RowsConfig(model=ENTRY, method=m, parts=dict(parts), engine=Engine(checkpoint_every=0), **choice)
        for name, (_, choice) in asked.items()
        for m, parts in methods.items()
    }
    say(f"unlearning by {len(methods)} methods")
    with bars("unlearning") as bar:
        run_jobs([Job("rows", c.model_dump(mode="json"), str(out)) for out, c in configs.items()], bar)
    say(f"retraining without the rows, {RETRAINED + REFERENCES} models for each request, and audit")
    with bars("audit") as bar:
        config = RowAuditConfig(retrain=RETRAINED, references=REFERENCES).model_dump(mode="json")
        jobs = [{"runs": list(methods), "audit": config, "title": f"Digits: {title}"} for title, _ in asked.values()]
        run_jobs([Job("rows-audit", job, str(folder / name)) for job, name in zip(jobs, asked, strict=True)], bar)
    documents = [AuditDocument.model_validate_json((folder / n / DOCUMENT).read_text(encoding="utf-8")) for n in asked]
    return RowDemo(documents, folder, time.perf_counter() - started)


def _begun(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()
