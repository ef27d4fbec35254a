"""Carrying a sweep out: the reference, the trials round by round, the choice; every trial a file of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge.core.files import alone, check_room, digest_json, write_json, write_text
from expunge.core.runs import Run
from expunge.engine.outcome import Progress
from expunge.engine.tasks import Workers, spread, threads
from expunge.methods.search import with_values
from expunge.pipeline import sweep_trial, tradeoff
from expunge.pipeline.sampling import rounds, values_of
from expunge.pipeline.sweep import KIND, Study, SweepPlan
from expunge.pipeline.sweep_document import SweepDocument
from expunge.pipeline.sweep_result import DOCUMENT, REFERENCE, Results, document_of, place_of, read
from expunge.pipeline.tradeoff import Reference
from expunge.pipeline.tuned import USED, used_text
from expunge.pipeline.validation import RowGround
from expunge.pipeline.workers import Job, run_jobs


@dataclass(frozen=True)
class Hands:
    """By whom trials are done.

    Attributes:
        workers: processes on this machine; none: one where there is an accelerator, else one for each core, at most four.
        where: "local", or "ray".
        address: of a Ray cluster; None starts one on this machine.
    """

    workers: int | None = None
    where: Workers = "local"
    address: str | None = None


def execute(
    made: SweepPlan, out: Path, *, resume: bool = False, progress: Progress | None = None, hands: Hands | None = None
) -> SweepDocument:
    """Do all trials, choose, and leave ``sweep.json``, ``chosen.yaml`` and ``settings/METHOD.yaml`` in a run folder.

    Args:
        made: the checked sweep.
        out: its folder.
        resume: go on where a killed sweep stopped.
        progress: told trials that have ended, of how many.
        hands: by whom they are done; none: by processes on this machine.

    Raises:
        InputError: the folder is in use, or holds another sweep; or there is nothing to forget on the validation records.
    """
    config = made.config
    at_work = hands or Hands()
    weights = sum(p.numel() * p.element_size() for p in made.adapter.model.parameters())
    check_room(out, weights + 3 * weights * (at_work.workers or 4), "A sweep")  # the target's, and checkpoints under way
    run = Run.start(out, KIND, config.model_dump(mode="json"), resume=resume)
    inputs = _inputs(made)
    run.check_same("sweep", inputs)
    run.note_inputs(target={"source": config.request["model"], "digest": made.target})

    def work() -> dict[str, Any]:
        (out / "trials").mkdir(exist_ok=True)
        with alone(out / "trials"):
            write_text(out / USED, used_text(made.ground.used()))
            _keep_target(made, out)
            reference = _reference(made, out, progress)
            reference.check()
            results = _Trials(made, out, reference, at_work, progress).all()
            document = document_of(made, out, reference, results)
            write_text(out / DOCUMENT, document.model_dump_json(indent=1) + "\n")
        return {"best": document.best, "chosen": {m.method: m.chosen for m in document.methods}}

    run.stage("sweep", inputs, work, [DOCUMENT, USED, REFERENCE, "settings"])
    return read(out)


def _inputs(made: SweepPlan) -> dict[str, Any]:
    ground = made.ground
    data = {name: records.digest for name, records in ground.used().items()}
    return {
        "target": made.target, "data": {**data, "train": ground.train.digest, "spared": ground.spared.digest},
        "spaces": {s.method: {d.path: d.range.text() for d in s.dimensions} for s in made.studies},
        "parts": {s.method: s.parts for s in made.studies},
    }  # fmt: skip


def _keep_target(made: SweepPlan, out: Path) -> None:
    """Write the weights of a target that the entry trains, so that no trial has to."""
    if not isinstance(made.ground, RowGround) or (out / "target").is_dir():
        return
    made.adapter.save(out / "target.partial")
    (out / "target.partial").replace(out / "target")


def _reference(made: SweepPlan, out: Path, progress: Progress | None) -> Reference:
    """What trials are compared with: measured once, and kept in the folder."""
    config, ground = made.config, made.ground
    key = digest_json(["reference-1", _inputs(made), config.retrain, config.retrained, config.threads])
    path = out / REFERENCE
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if held.get("key") != key:
        with threads(config.threads):
            target = ground.measure(made.adapter, made.adapter.model)
            gold = [ground.measure(a, a.model) for a in ground.gold(config.retrain, config.retrained, progress)]
            level = [list(m.losses) for m in gold] or [ground.level(made.adapter)]
        of = f"{len(gold)} retrained model{'s' if len(gold) > 1 else ''}" if gold else ground.stand_in
        utility = {name: float(np.mean([m.utility[name] for m in gold or [target]])) for name in target.utility}
        held = {
            "key": key, "target": {"losses": list(target.losses), "utility": dict(target.utility)}, "unseen": level,
            "retrained": len(gold), "of": of, "utility": utility,
        }  # fmt: skip
        write_json(path, held)
    return Reference(
        np.array(held["target"]["losses"]), np.array(held["unseen"]), bool(held["retrained"]), held["utility"],
        tuple(ground.forget.clusters()), held["of"],
    )  # fmt: skip


@dataclass
class _Trials:
    """The trials of a sweep."""

    made: SweepPlan
    out: Path
    reference: Reference
    hands: Hands
    progress: Progress | None

    def all(self) -> Results:
        """Round by round: what is drawn in a round depends on the results of earlier rounds alone."""
        config = self.made.config
        results: Results = {s.method: [] for s in self.made.studies}
        for first, last in rounds(config.sampler, config.trials, config.at_once):
            jobs = [job for s in self.made.studies for job in self._round(s, results[s.method], range(first, last))]
            self._do(jobs)
            for folder, job in jobs:
                found = sweep_trial.result_of(folder, job["key"])
                assert found is not None
                results[job["method"]].append(found)
                sweep_trial.tidy(folder)
        return results

    def _round(self, study: Study, results: Sequence[Mapping[str, Any]], indices: range) -> list[tuple[Path, dict[str, Any]]]:
        config = self.made.config
        earlier = [(r["values"], tradeoff.score(place_of(r, self.reference), config.rule, config.bound)) for r in results]

        def values(index: int) -> dict[str, Any]:
            return values_of(config.sampler, study.method, study.dimensions, index=index, seed=config.seed, earlier=earlier)

        return [self._job(study, i, values(i)) for i in indices]

    def _job(self, study: Study, index: int, values: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        config = self.made.config
        job = {
            "rows": config.rows, "request": {k: v for k, v in config.request.items() if k != "parts"},
            "split": config.split.model_dump(mode="json"), "target": self.made.target, "threads": config.threads,
            "method": study.method, "index": index, "values": dict(values), "parts": with_values(study.parts, values),
            "seed": 10_000 * (config.seed + 1) + index,
        }  # fmt: skip
        key = digest_json(["trial-1", _inputs(self.made)["data"], job])
        weights = str((self.out / "target").absolute()) if (self.out / "target").is_dir() else None
        return self.out / "trials" / f"{study.method}-{index:03d}", {**job, "key": key, "weights": weights}

    def _do(self, jobs: Sequence[tuple[Path, dict[str, Any]]]) -> None:
        """Do the trials that have not been done."""
        left = [(folder, job) for folder, job in jobs if sweep_trial.result_of(folder, job["key"]) is None]
        self._tell("")
        if self.hands.where != "ray":
            tell = lambda done, total, text: self._tell(text)  # noqa: E731
            alone_on_it = 1 if torch.cuda.is_available() else None  # of several models on one accelerator the user must say so
            run_jobs([Job("trial", job, str(folder)) for folder, job in left], tell, self.hands.workers or alone_on_it)
            return
        common = {"folder": str(Path.cwd())}
        for folder, found in spread(sweep_trial.on_worker, common, left, workers="ray", address=self.hands.address):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / sweep_trial.RESULT, found)
            self._tell("on Ray workers")

    def _tell(self, text: str) -> None:
        if self.progress is not None:
            total = len(self.made.studies) * self.made.config.trials
            ended = sum(1 for _ in (self.out / "trials").glob(f"*/{sweep_trial.RESULT}"))
            self.progress(min(ended, total), total, text)
