"""``expunge demo classifier``: digits, a network that knows them, three requests, a dozen methods, one report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from expunge.adapters.supervised import SupervisedAdapter
from expunge.audit.document import AuditDocument
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.core.files import write_text
from expunge.core.runs import Run
from expunge.data.rows import Indices, table
from expunge.engine.members import Training
from expunge.engine.options import Engine
from expunge.pipeline.audit import DOCUMENT
from expunge.pipeline.demo import Bars
from expunge.pipeline.row_audit import RowAuditConfig, audited, comparison, measure
from expunge.pipeline.row_runs import RowsConfig, sets_of
from expunge.pipeline.supervised import Supervised, target_of
from expunge.pipeline.workers import Job, run_jobs

ENTRY = "expunge.pipeline.demo_rows:digits"
TRAINED, WRONG, RANDOM = 1000, 50, 50  #: rows trained on; of these mislabelled; and to be forgotten at random
RETRAINED, REFERENCES = 5, 12

#: A dozen methods. Fine-tuning and l1-sparse run at the rate of the original training: hot enough to leave its weights behind.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "retrain": {"schedule": {"name": "fixed", "lr": 3e-3, "epochs": None, "steps": 1200, "batch": 100, "warmup": 0}},
    "finetune": {"schedule": {"name": "fixed", "lr": 1e-2, "epochs": None, "steps": 600, "batch": 100, "warmup": 0}},
    "l1-sparse": {"schedule": {"name": "fixed", "lr": 3e-3, "epochs": None, "steps": 400, "batch": 100, "warmup": 0}},
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
        training=Training(steps=1200, batch=100, lr=3e-3),
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
        target = problem.adapter(target_of(problem, progress=bar))
    documents = []
    for name, (title, choice) in requests(problem).items():
        say(f"forgetting {title}")
        runs = {m: _config(m, parts, choice) for m, parts in methods.items()}
        documents.append(_request((problem, target), folder / name, title, runs, bars))
    return RowDemo(documents, folder, time.perf_counter() - started)


def _request(
    trained: tuple[Supervised, SupervisedAdapter], place: Path, title: str, runs: Mapping[str, RowsConfig], bars: Bars
) -> AuditDocument:
    """One request by all methods, and its audit."""
    problem, target = trained
    dumps = {m: c.model_dump(mode="json") for m, c in runs.items()}
    held = Run.start(place, "demo", {"methods": dumps}, resume=(place / "manifest.json").is_file())
    with bars("unlearning") as bar:
        run_jobs([Job("rows", dump, str(place / m)) for m, dump in dumps.items()], bar)
    chosen = next(iter(runs.values())).choose(problem.data)
    config = RowAuditConfig(retrain=RETRAINED, references=REFERENCES)
    sets = sets_of(problem, chosen, seed=0)
    inputs = {
        "target": target.fingerprint(), "sets": {k: v.digest for k, v in sets.items()},
        "config": config.model_dump(mode="json"),
        "runs": {m: Run.open(place / m).manifest["stages"]["unlearn"]["outputs"] for m in runs},
    }  # fmt: skip

    def work() -> dict[str, Any]:
        with bars("retraining") as bar:
            gold, references = comparison(problem, target, chosen, sets, config, progress=bar)
        models = [AuditedModel("target", "target", target, path=ENTRY), *gold]
        models += [audited(Run.open(place / m), target, label=m) for m in runs]
        with bars("audit") as bar:
            document = measure(models, sets, AuditSettings(), references, progress=bar, title=f"Digits: {title}")
        write_text(place / DOCUMENT, document.model_dump_json(indent=2) + "\n")
        return {"verdicts": {m.label: m.judgement.verdict for m in document.models if m.judgement}}

    held.stage("audit", inputs, work, [DOCUMENT])
    return AuditDocument.model_validate_json((place / DOCUMENT).read_text(encoding="utf-8"))


def _config(method: str, parts: Mapping[str, Any], choice: Mapping[str, Any]) -> RowsConfig:
    return RowsConfig(model=ENTRY, method=method, parts=dict(parts), engine=Engine(checkpoint_every=0), **choice)
