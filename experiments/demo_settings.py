"""Settings for models of the demo's size: every method for language models, swept on the demo's invented people.

Usage, from the repository root::

    OMP_NUM_THREADS=1 python -m experiments.demo_settings --out runs/demo-settings --tuned src/expunge/methods/tuned/demo

The target is that of ``expunge demo``. What trials forget is a stand-in, people whom the demo keeps, so nothing that the demo
judges is in any trial. Budget, ranges and rule are those of :mod:`experiments.llm_methods`; a sweep that fails stands as failed,
and one that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.llm_methods import RANGES, Plan, given, language_methods
from experiments.ship import origin_of, write
from experiments.stages import Stages
from experiments.tofu_page import parameters
from experiments.tofu_small import say, train_once
from expunge.core.errors import ExpungeError
from expunge.core.files import write_text
from expunge.data.sources import load
from expunge.pipeline import demo, sweep, sweep_run, train
from expunge.pipeline.config import TextConfig, TrainConfig
from expunge.pipeline.models import open_adapter
from expunge.pipeline.sweep_result import read

SEED = 9  #: of the model retrained without the stand-in


@dataclass(frozen=True)
class People:
    """What the sweeps depend on.

    Attributes:
        out: folder of the runs.
        methods: names.
        standin: people whom trials forget: the last ones of those that the demo keeps.
        trials: of each method.
        world: the invented people.
        schedule: of the training.
        apart: do each sweep in a process of its own.
    """

    out: Path
    methods: tuple[str, ...]
    standin: int = 6
    trials: int = 3
    world: str = demo.WORLD
    schedule: tuple[tuple[str, Any], ...] = tuple(demo.SCHEDULE.items())
    apart: bool = True

    def file(self, name: str) -> str:
        """Records of the stand-in, or of all others that are kept."""
        return str(self.out / "data" / f"{name}.jsonl")

    def place(self, method: str) -> Path:
        """Folder of a sweep."""
        return self.out / "sweeps" / method


def experiment(people: People) -> None:
    """Train both models, sweep all methods; what is done is not done again."""
    _write_data(people)
    stages = Stages(apart=people.apart)
    stages.do("models", lambda: _models(people), people.out / "models.failed", again=True)
    if people.apart:
        open_adapter(str(people.out / "target"), TextConfig())  # its imports serve all processes
    for method in people.methods:
        if not (people.place(method) / sweep.DOCUMENT).is_file():
            people.place(method).parent.mkdir(exist_ok=True)
            stages.do(f"{method}: sweep", lambda m=method: _sweep(people, m), people.out / "sweeps" / f"{method}.failed")  # type: ignore[misc]


def _write_data(people: People) -> None:
    (people.out / "data").mkdir(parents=True, exist_ok=True)
    kept = load(f"people:rest?{people.world}", name="rest")
    chosen = set([c for c in dict.fromkeys(kept.clusters()) if c.startswith("person")][-people.standin :])
    for name, inside in (("standin", True), ("rest", False)):
        rows = [
            {"id": r.id, "subject": r.cluster, "question": r.prompt, "answer": r.answer}
            for r in kept
            if (r.cluster in chosen) == inside
        ]
        write_text(Path(people.file(name)), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _models(people: People) -> None:
    config = TrainConfig(
        model="llama-tiny", data=(f"people:all?{people.world}",), vocabulary=(f"people:holdout?{people.world}",), scratch=True,
        parts={"schedule": dict(people.schedule)},
    )  # fmt: skip
    train_once(config, people.out / "target")
    gone = load(people.file("standin"), name="standin")
    train_once(train.retraining(config, gone, SEED)[0], people.out / "without-standin")


def sweep_config(people: People, method: str) -> sweep.SweepConfig:
    """The sweep of a method."""
    forget = people.file("standin")
    request = {
        "model": str(people.out / "target"), "forget": forget, "retain": people.file("rest"),
        "holdout": f"people:holdout?{people.world}", "engine": {"checkpoint_every": 0},
        "parts": {**Plan(people.out).parts_of(method), **given(method, forget)},
    }  # fmt: skip
    return sweep.SweepConfig(
        request=request, methods=(method,), trials=people.trials, split={"forget_share": 1.0}, rule="balanced",  # type: ignore[arg-type]
        retrained=(str(people.out / "without-standin"),), search=RANGES.get(method, {}),
    )  # fmt: skip


def _sweep(people: People, method: str) -> None:
    out = people.place(method)
    made = sweep.plan(sweep_config(people, method))
    sweep_run.execute(made, out, resume=(out / "manifest.json").is_file(), hands=sweep_run.Hands(workers=1))


def write_settings(people: People, folder: Path) -> None:
    """Write what the sweeps that have ended chose."""
    documents = {m: read(people.place(m)) for m in people.methods if (people.place(m) / sweep.DOCUMENT).is_file()}
    origin = origin_of(
        "experiments.demo_settings", next(iter(documents.values())),
        data=f"invented people: people:all?{people.world}; {people.standin} of those that are kept forgotten",
        model=f"llama-tiny, {parameters(people.out / 'target' / 'model'):,} parameters",
        budget=", ".join(f"schedule.{k}={v}" for k, v in Plan(people.out).parts["schedule"].items()),
    )  # fmt: skip
    title = "Settings for the demo's model of invented people, for every method that serves language models"
    write(folder, {m: people.place(m) for m in documents}, documents, title, origin)


def main(words: Sequence[str] | None = None) -> int:
    """Run the sweeps, write the settings."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo_settings", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-settings"), help="folder of the runs")
    parser.add_argument("--tuned", type=Path, help="folder for the settings")
    parser.add_argument("--methods", nargs="+", help="methods; none given: all that serve language models")
    parser.add_argument("--only-settings", action="store_true", help="run nothing: write the settings of what has ended")
    asked = parser.parse_args(words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    people = People(asked.out, tuple(asked.methods or language_methods()))
    try:
        if not asked.only_settings:
            experiment(people)
        if asked.tuned:
            write_settings(people, asked.tuned)
    except ExpungeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    say("done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
