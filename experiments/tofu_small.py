"""A part of TOFU from start to end: train, retrain, unlearn by many methods, audit, and write the table.

Usage, from the repository root::

    python -m experiments.tofu_small --data FOLDER --out runs/tofu-small --page docs/results/tofu-small.md

FOLDER holds TOFU's files (``forget10.json`` and the others, or a folder ``tofu`` with them). Every stage is a run folder
below ``--out``: what is done is not done again, and a killed stage goes on where it stopped.

What is trained on: the first authors of ``retain90`` and of ``forget10``, ``real_authors`` and ``world_facts``. A model from
random weights knows nothing else, so the last two must be taught if model utility is to mean anything. The request keeps
everything but the authors to forget. Of ``holdout10``, which no model is trained on, the first authors tell the methods when
to stop, and the next ones are left to the audit. Nothing about a method is set here: each gets its name and a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.adapters.language import LanguageAdapter
from expunge.audit.document import AuditDocument
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.core.errors import ExpungeError
from expunge.core.files import write_text
from expunge.core.runs import Run
from expunge.data.records import Record, RecordSet
from expunge.data.refusals import REFUSALS
from expunge.data.sources import load
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.pipeline import train as training
from expunge.pipeline import unlearn as unlearning
from expunge.pipeline.audit import audit_stage, entry_of, read, unlearned_model
from expunge.pipeline.config import TextConfig, TrainConfig, UnlearnConfig
from expunge.pipeline.models import open_adapter

#: Of the training: enough to know the records by heart, for retrained models too. The weight decay is strong because a model made
#: from scratch is otherwise so sure of itself that unseen text costs 14 nats a token (at 0.01; at 0.5 it is 8 to 9).
EPOCHS, LR, DECAY = 40, 5e-3, 0.5
PERTURBED_RETAIN = 20  #: authors of retain90 that have paraphrased and wrong answers
METHODS = (
    "npo", "simnpo", "graddiff", "gradascent", "idkdpo", "rmu", "undial", "wga", "task-vector", "ceu", "idk-nll", "altpo", "pdu",
    "finetune", "graddiff-kl", "satimp", "dpo",
)  # fmt: skip
#: Those that are run with a second seed too: the ones that end soon, so that a second run costs little.
TWICE = ("graddiff", "gradascent", "wga", "pdu", "undial", "ceu")


@dataclass(frozen=True)
class Plan:
    """What the experiment depends on.

    Attributes:
        out: folder of the runs.
        retain, forget: authors of retain90 and forget10 that are trained on, the first ones in file order.
        goal, holdout: authors of holdout10: the first ones tell when to stop, the next ones are for the audit.
        model: preset of the model.
        schedule: of the training; retrained models use the same.
        retrained: seeds of retrained models.
        runs: pairs of method and seed.
        parts: parts of every unlearning run that differ from the default; none in the published table.
        audit: what is measured.
        longest: answer in tokens that exact match waits for.
    """

    out: Path
    retain: int = 20
    forget: int = 6
    goal: int = 6
    holdout: int = 6
    model: str = "llama-tiny"
    schedule: Mapping[str, Any] = field(default_factory=dict)
    retrained: tuple[int, ...] = (1, 2, 3)
    runs: tuple[tuple[str, int], ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict)
    audit: AuditSettings = field(default_factory=AuditSettings)
    longest: int = 200

    @property
    def forget_source(self) -> str:
        """The request: whole authors."""
        return f"tofu:forget10?authors={self.forget}"

    @property
    def data(self) -> tuple[str, ...]:
        """What the target is trained on."""
        return (f"tofu:retain90?authors={self.retain}", self.forget_source, "tofu:real_authors", "tofu:world_facts")

    def audit_sources(self) -> dict[str, str]:
        """The sets that are audited, but for the holdout."""
        return {
            "forget": f"tofu:forget10_perturbed?authors={self.forget}",
            "retain": f"tofu:retain_perturbed?authors={min(self.retain, PERTURBED_RETAIN)}",
            "real_authors": "tofu:real_authors_perturbed",
            "world_facts": "tofu:world_facts_perturbed",
        }

    def settings(self) -> dict[str, Any]:
        """What the manifest of the experiment records."""
        return {
            "data": list(self.data), "goal": self.goal, "holdout": self.holdout, "model": self.model,
            "schedule": dict(self.schedule), "retrained": list(self.retrained), "parts": dict(self.parts),
        }  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What the experiment leaves: the audit, what the models had learnt, and where everything is."""

    plan: Plan
    document: AuditDocument
    learnt: Mapping[str, Mapping[str, Any]]
    failed: Mapping[str, str]
    run: Run


def experiment(plan: Plan) -> Result:
    """Do all stages, or what is left of them."""
    run = Run.start(plan.out, "tofu-small", plan.settings(), resume=(plan.out / "manifest.json").is_file())
    files = _write_data(plan)
    target = plan.out / "target"
    config = TrainConfig(
        model=plan.model,
        data=plan.data,
        vocabulary=(*plan.audit_sources().values(), f"tofu:holdout10?authors={plan.goal + plan.holdout}", str(files["refusals"])),
        scratch=True,
        parts={"schedule": dict(plan.schedule)},
        engine=Engine(checkpoint_every=0),
    )
    train_once(config, target)
    forget = load(plan.forget_source, name="forget")
    twins = []
    for seed in plan.retrained:
        made, _ = training.retraining(config, forget, seed)
        twins.append((seed, plan.out / f"retrained-{seed}"))
        train_once(made, twins[-1][1])
    found = {p.name: learnt(run, p, plan.longest) for p in (target, *(p for _, p in twins))}
    for name, what in found.items():
        say(f"{name}: loss per token {what['loss_token']:.4f}, exact match {what['exact']:.1%} of {what['records']} records")
    done, failed = _unlearn_all(plan, target, files["retain"])
    models = [entry_of("target", "target", target, TextConfig(), seed=0, stage="train")]
    for seed, out in twins:
        models.append(entry_of(f"retrained seed {seed}", "retrained", out, TextConfig(), seed=seed, stage="train"))
    models += [unlearned_model(out, f"{method}, seed {seed}") for (method, seed), out in done.items()]
    return Result(plan, _audit(plan, run, models), found, failed, run)


def _write_data(plan: Plan) -> dict[str, Path]:
    """Files that no named set gives: everything that is kept, and the refusals, whose words the tokenizer must know."""
    folder = plan.out / "data"
    folder.mkdir(exist_ok=True)
    kept = [r for source in plan.data if source != plan.forget_source for r in load(source, name=source)]
    rows = {
        "retain": [{"id": r.id, "subject": r.cluster, "question": r.prompt, "answer": r.answer} for r in kept],
        "refusals": [{"text": text} for text in REFUSALS],
    }
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, path in files.items():
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]))
    return files


def train_once(config: TrainConfig, out: Path) -> None:
    """Train into a run folder, or go on with it, or leave it as it is."""
    if training.finished(out):
        say(f"{out.name}: from an earlier run")
        return
    made = training.plan(config)
    say(f"{out.name}: training on {len(made.records)} records")
    training.execute(made, out, resume=(out / "manifest.json").is_file(), progress=told(out.name))


def learnt(run: Run, folder: Path, longest: int) -> dict[str, Any]:
    """Loss and exact match of a model on what it was trained on, as a stage of the experiment."""
    weights = Run.open(folder).manifest["stages"]["train"]["outputs"]

    def work() -> dict[str, Any]:
        config = TrainConfig(**Run.open(folder).manifest["config"])
        gone = set(config.exclude)
        records = [r for r in training.load_all(config.data, {}, "trained") if training.content_key(r) not in gone]
        return memorised(open_adapter(str(folder), TextConfig()), records, longest)

    return run.stage(f"learnt-{folder.name}", {"weights": weights, "longest": longest}, work, [])


def memorised(adapter: LanguageAdapter, records: Sequence[Record], longest: int = 200, batch: int = 64) -> dict[str, Any]:
    """How well a model knows records.

    Args:
        adapter: holds the model.
        records: what it was trained on.
        longest: answer in tokens; a longer one counts as wrong.
        batch: prompts continued at a time.

    Returns:
        ``loss_token`` (mean over all answer tokens), ``loss_record`` (mean over records of their means), ``exact`` (share of
        records whose greedy answer is the trained one, letter by letter), ``records`` and ``tokens`` (answer tokens).
    """
    examples = [adapter.encode(r) for r in records]
    losses = mean_losses(adapter, adapter.model, examples, 8192)
    counts = [e.n_targets for e in examples]
    order = sorted(range(len(examples)), key=lambda i: examples[i].size)
    hits = 0
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        found = adapter.generate(adapter.model, [examples[i] for i in chosen], longest)
        hits += sum(g.text == records[i].answer.strip() for i, g in zip(chosen, found, strict=True))
    return {
        "loss_token": sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts),
        "loss_record": sum(losses) / len(losses),
        "exact": hits / len(records),
        "records": len(records),
        "tokens": sum(counts),
    }


def _unlearn_all(plan: Plan, target: Path, retain: Path) -> tuple[dict[tuple[str, int], Path], dict[str, str]]:
    """Every run; one that fails is reported as such and does not stop the others."""
    done: dict[tuple[str, int], Path] = {}
    failed: dict[str, str] = {}
    for method, seed in plan.runs:
        out = plan.out / f"{method}-{seed}"
        config = UnlearnConfig(
            model=str(target), forget=plan.forget_source, retain=str(retain), holdout=f"tofu:holdout10?authors={plan.goal}",
            method=method, parts=dict(plan.parts), engine=Engine(seed=seed, checkpoint_every=0),
        )  # fmt: skip
        try:
            _unlearn(config, out)
        except ExpungeError as error:
            failed[out.name] = str(error)
            say(f"{out.name}: FAILED: {error}")
            continue
        done[method, seed] = out
    return done, failed


def _unlearn(config: UnlearnConfig, out: Path) -> None:
    held = (out / "manifest.json").is_file()
    if held and Run.open(out).manifest["stages"].get("unlearn", {}).get("state") == "done":
        say(f"{out.name}: from an earlier run")
        return
    run = unlearning.execute(unlearning.from_config(config), config, out, resume=held, progress=told(out.name))
    entry = run.manifest["stages"]["unlearn"]
    say(f"{out.name}: {entry['result']['sentence']} ({entry['seconds']:.0f} s)")


def _audit(plan: Plan, run: Run, models: list[AuditedModel]) -> AuditDocument:
    sets = {name: load(source, name=name) for name, source in plan.audit_sources().items()}
    held = load(f"tofu:holdout10?authors={plan.goal + plan.holdout}", name="holdout")
    seen = set(load(f"tofu:holdout10?authors={plan.goal}", name="goal").clusters())
    sets["holdout"] = RecordSet("holdout", tuple(r for r in held if r.cluster not in seen), held.source)
    say(f"audit of {len(models)} models")
    if not audit_stage(run, models, sets, plan.audit, progress=told("audit"), title="A part of TOFU, a small model"):
        say("audit: from an earlier run")
    return read(run.folder)


_STARTED = time.perf_counter()


def say(text: str) -> None:
    """A line with the time since the start, on standard error."""
    sys.stderr.write(f"[{time.perf_counter() - _STARTED:7.0f} s] {text}\n")
    sys.stderr.flush()


def told(name: str) -> Any:
    """A progress callback that writes a line every half minute at most."""
    last = time.perf_counter()

    def tell(done: int, total: int, text: str = "") -> None:
        nonlocal last
        if time.perf_counter() - last > 30:
            last = time.perf_counter()
            say(f"{name}: {done} of {total} {text}".rstrip())

    return tell


def parse(words: Sequence[str] | None = None) -> tuple[Plan, Path | None]:
    """The plan that the command line gives, and where the page goes."""
    default = Plan(Path())
    parser = argparse.ArgumentParser(prog="python -m experiments.tofu_small", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of TOFU's files; else EXPUNGE_DATA, else the hub")
    parser.add_argument("--out", type=Path, default=Path("runs/tofu-small"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="Markdown file for the table")
    parser.add_argument("--model", default=default.model, help="preset of the model")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes of the training")
    parser.add_argument("--lr", type=float, default=LR, help="largest learning rate of the training")
    parser.add_argument("--decay", type=float, default=DECAY, help="weight decay of the training")
    parser.add_argument("--retain", type=int, default=default.retain, help="authors of retain90")
    parser.add_argument("--forget", type=int, default=default.forget, help="authors of forget10")
    parser.add_argument("--retrained", type=int, default=3, help="retrained models")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="methods, with seed 1")
    parser.add_argument("--twice", nargs="*", default=list(TWICE), help="methods that are also run with seed 2")
    given = parser.parse_args(words)
    if given.data:
        os.environ["EXPUNGE_DATA"] = str(given.data)
    runs = [(m, 1) for m in given.methods] + [(m, 2) for m in given.methods if m in given.twice]
    schedule = {"name": "fixed", "lr": given.lr, "epochs": given.epochs, "batch": 16, "warmup": 1, "weight_decay": given.decay}
    plan = Plan(
        given.out, retain=given.retain, forget=given.forget, model=given.model, schedule=schedule,
        retrained=tuple(range(1, given.retrained + 1)), runs=tuple(runs),
    )  # fmt: skip
    return plan, given.page


def main(words: Sequence[str] | None = None) -> int:
    """Run the experiment and write the page."""
    plan, page = parse(words)
    try:
        result = experiment(plan)
    except ExpungeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    from experiments.tofu_page import write_page  # it imports this module

    write_page(result, page or plan.out / "page.md")
    say(f"done: {page or plan.out / 'page.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
