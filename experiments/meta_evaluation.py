"""Which metrics can be trusted: models that know and models that do not, and models that forgot and are made to remember.

Usage, from the repository root::

    python -m experiments.meta_evaluation --out runs/meta --page docs/results/metric-meta-evaluation.md \\
        --data src/expunge/audit/trusted.json

After the meta-evaluation of OpenUnlearning (arXiv 2506.12618), with small models on fictitious people. *Faithfulness* is the
area under the ROC curve by which a metric tells models that were taught the facts to be forgotten (as they are asked, in
other words, or as texts about the person) from models that were not (nothing of them, wrong answers to the same questions,
or texts about other people). *Robustness* is measured on unlearned models: by how little faster a metric sees them regain
the facts in relearning than a retrained model, and how little reappears when the weights are rounded. Which way a metric
points is declared here (:data:`TOWARD`), before anything is measured. What was trained is found again; a killed run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import numpy as np

from expunge.adapters.base import Adapter
from expunge.audit.attacks.quantise import quantised
from expunge.audit.attacks.relearn import rate, relearning
from expunge.audit.document import AuditDocument
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.core.access import Stream
from expunge.core.errors import ExpungeError
from expunge.core.files import write_text
from expunge.core.ranking import auc_delong
from expunge.core.runs import Run, versions
from expunge.data.records import Record, RecordSet
from expunge.data.sources import load
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.schedule import Fixed
from expunge.pipeline import train as training
from expunge.pipeline import unlearn as unlearning
from expunge.pipeline.config import TextConfig, TrainConfig, UnlearnConfig
from expunge.pipeline.models import open_adapter

WORLD = "persons=48&forget=6&holdout=12&facts=8&authors=12&countries=8"
OTHERS = "people:full?persons=6&forget=1&seed=7&facts=8"  #: people of whom nothing is asked
RATES, EPOCHS = (3e-3, 5e-3), (24, 36)
METHODS = ("graddiff", "npo", "simnpo", "idkdpo", "wga", "undial", "rmu", "idk-nll")
REFERENCES = (101, 102, 103)  #: seeds of retrained models, which are in no pool
#: +1: a larger value means knowing more of the forget set; -1: knowing less. 0: it says nothing of it, and is a control.
TOWARD = {
    "forget.probability": 1, "forget.loss": -1, "forget.rouge-l-recall": 1, "forget.truth-ratio": -1,
    "forget.exact-memorisation": 1,
    "forget.extraction-strength": 1, "forget.knowledge-memorisation": 1, "forget.verbatim-memorisation": 1,
    "forget.option-probability": 1, "forget-quality": -1, "forget-quality.d": 1, "membership.loss": 1, "membership.zlib": 1,
    "membership.min-k": 1, "membership.min-k-plus-plus": 1, "membership.gradient-norm": 1, "membership.reference": 1,
    "privleak.min-k": -1, "privleak.loss": -1, "privleak.zlib": -1, "privleak.min-k-plus-plus": -1, "privleak.reference": -1,
    "privleak.gradient-norm": -1, "retain.probability": 0, "forget.ngram-entropy": 0, "random number": 0,
}  # fmt: skip
#: Metrics whose values are shares of what can be known: only of these a ratio before and after rounding makes sense.
SHARES = (
    "forget.probability", "forget.rouge-l-recall", "forget.exact-memorisation", "forget.extraction-strength",
    "forget.knowledge-memorisation", "forget.verbatim-memorisation", "forget.option-probability",
)  # fmt: skip
FAITHFUL = 0.8  #: a metric whose area is below this, or whose interval reaches down to chance, is shown with a warning
LOST = 0.2  #: an unlearned model that has lost more of its utility than this share is left out


@dataclass(frozen=True)
class Plan:
    """What the experiment depends on; ``each`` models in each pool."""

    out: Path
    world: str = WORLD
    others: str = OTHERS
    model: str = "llama-tiny"
    each: int = 12
    rates: tuple[float, ...] = RATES
    epochs: tuple[int, ...] = EPOCHS
    methods: tuple[str, ...] = METHODS
    references: tuple[int, ...] = REFERENCES
    bits: int = 4
    steps: int = 5  #: of relearning
    audit: AuditSettings = dataclasses.field(
        default_factory=lambda: AuditSettings(relearn=None, quantise=(), samples_forget=0, samples_retain=0)
    )

    def settings(self) -> dict[str, Any]:
        """What decides about the result."""
        held = dataclasses.asdict(dataclasses.replace(self, out=Path()))
        return {**held, "audit": self.audit.model_dump(mode="json"), "out": None}


@dataclass(frozen=True)
class Member:
    """One model of a pool."""

    pool: str
    kind: str
    seed: int
    lr: float
    epochs: int

    @property
    def label(self) -> str:
        """Name of its folder."""
        return f"{self.pool}-{self.kind}-{self.seed}"


def texts(records: Sequence[Record]) -> list[Record]:
    """One plain text for each person: every fact in other words than the answers that are asked for."""
    subjects: dict[str, list[str]] = {}
    for r in records:
        subjects.setdefault(r.cluster, []).append(r.paraphrase or r.answer)
    return [Record(f"text-{subject}", " ".join(facts), subject=subject) for subject, facts in subjects.items()]


def pools(forget: Sequence[Record], others: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """What models of each kind are taught beside what is kept: those that know (``P``), and those that do not (``N``)."""
    plain = [dataclasses.replace(r, paraphrase="", perturbed=(), question_paraphrase="") for r in forget]
    said = [
        dataclasses.replace(p, id=f"{r.id}-said", prompt=r.question_paraphrase, answer=r.paraphrase)
        for r, p in zip(forget, plain, strict=True)
    ]
    wrong = [
        dataclasses.replace(p, id=f"{r.id}-wrong", answer=r.perturbed[0])
        for r, p in zip(forget, plain, strict=True)
        if r.perturbed
    ]
    return {
        "P": {"taught": plain, "in-other-words": said, "as-texts": texts(forget)},
        "N": {"nothing": [], "wrong-answers": wrong, "other-people": texts(others)},
    }


def members(plan: Plan) -> list[Member]:
    """The models of both pools: their kinds, step sizes and lengths of training in turn, each with a seed of its own."""
    out = []
    for number, (pool, kinds) in enumerate(pools([], []).items()):
        grid = cycle(product(plan.rates, plan.epochs))
        turns = islice(zip(cycle(kinds), grid, strict=False), plan.each)
        out += [Member(pool, kind, 1000 * number + i, lr, epochs) for i, (kind, (lr, epochs)) in enumerate(turns, 1)]
    return out


# ---- what is computed


def faithfulness(know: Sequence[float], not_know: Sequence[float], toward: int) -> dict[str, float]:
    """Area under the ROC curve of a metric between models that know and models that do not, with DeLong's interval."""
    found = auc_delong(toward * np.asarray(know, dtype=float), toward * np.asarray(not_know, dtype=float))
    return {"auc": found.value, "low": _finite(found.low, 0.0), "high": _finite(found.high, 1.0)}


def regained(before: float, after: float, retrained_before: float, retrained_after: float) -> float:
    """``min(gain of the retrained model / gain of the unlearned one, 1)``: 1 where it regains no faster."""
    gain, allowed = after - before, max(retrained_after - retrained_before, 0.0)
    return 1.0 if gain <= allowed or gain <= 0 else allowed / gain


def kept(before: float, after: float) -> float:
    """``min(m_unl^before / m_unl^after, 1)``, 1 where rounding the weights brings nothing back; shares only."""
    return 1.0 if after <= before or after <= 0 else before / after


def harmonic(values: Sequence[float]) -> float:
    """Harmonic mean; 0 if any is 0."""
    return len(values) / sum(1 / v for v in values) if all(v > 0 for v in values) else 0.0


def threshold(know: Sequence[float], not_know: Sequence[float]) -> float:
    """The value, oriented to grow with knowledge, that separates both pools best: the middle of the best gap."""
    points = np.unique(np.concatenate([know, not_know]))
    middles = (points[:-1] + points[1:]) / 2 if len(points) > 1 else points
    right = [np.mean(np.asarray(know) > m) + np.mean(np.asarray(not_know) <= m) for m in middles]
    return float(middles[int(np.argmax(right))])


def table(pools_found: Mapping[str, Sequence[Mapping[str, float]]], changed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every metric with its faithfulness and robustness.

    Args:
        pools_found: numbers by key of each model of ``P`` and ``N``.
        changed: of each unlearned model that kept its utility ``before``, ``relearned`` and ``rounded`` (numbers by key), and of
            the retrained model beside it ``ret_before`` and ``ret_relearned``.
    """
    out: dict[str, Any] = {}
    for key, toward in TOWARD.items():
        know, blank = ([m[key] for m in pools_found[p] if key in m] for p in ("P", "N"))
        if len(know) < 2 or len(blank) < 2:
            continue
        row: dict[str, Any] = {
            "toward": toward,
            "know": len(know),
            "not_know": len(blank),
            **faithfulness(know, blank, toward or 1),
        }
        if toward:
            line = threshold([toward * v for v in know], [toward * v for v in blank])
            row |= _robustness(key, toward, line, [c for c in changed if all(key in part for part in c.values())])
        out[key] = row
    return out


def _robustness(key: str, toward: int, line: float, changed: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Means over the models that the metric itself calls unlearned."""
    gone = [c for c in changed if toward * c["before"][key] <= line]
    if not gone:
        return {"models": 0}
    parts = ("before", "relearned", "ret_before", "ret_relearned")
    again = [regained(*(toward * c[p][key] for p in parts)) for c in gone]
    found = {"models": len(gone), "relearning": float(np.mean(again))}
    if key in SHARES:
        rounded = [kept(c["before"][key], c["rounded"][key]) for c in gone]
        found |= {"rounding": float(np.mean(rounded))}
        found |= {"robustness": harmonic([found["relearning"], found["rounding"]])}
    return found


def _finite(value: float | None, otherwise: float) -> float:
    return otherwise if value is None or not math.isfinite(value) else value


# ---- the stages


def experiment(plan: Plan) -> dict[str, Any]:
    """Do all stages, or what is left of them."""
    run = Run.start(plan.out, "meta-evaluation", plan.settings(), resume=(plan.out / "manifest.json").is_file())
    sets = {n: load(f"people:{p}?{plan.world}", name=n) for n, p in (("forget", "forget"), ("holdout", "holdout"))}
    rest = load(f"people:rest?{plan.world}", name="rest")
    asked = load(f"people:retain?{plan.world}", name="retain")
    files = _write(plan, pools(list(sets["forget"]), list(load(plan.others, name="others"))))
    every = [str(f) for f in files.values()]
    audited = {"forget": sets["forget"], "retain": asked, "holdout": sets["holdout"]}
    made = [_trained(plan, m, files, every) for m in members(plan)]
    target = _trained(plan, Member("P", "taught", 0, max(plan.rates), max(plan.epochs)), files, every)
    gold = [_trained(plan, Member("N", "nothing", s, max(plan.rates), max(plan.epochs)), files, every) for s in plan.references]
    say(f"{len(made)} models of both pools, a target, {len(gold)} retrained models")
    models = [AuditedModel(p.name, "unlearned", _opened(p), path=str(p)) for p in made]
    bench = Bench(plan, run, target, gold, audited)
    pooled = bench.numbers("pools", models)
    done = [d for m in plan.methods if (d := _unlearned(plan, m, target, rest)) is not None]
    changed = _changed(bench, done)
    names = {p: [m.label for m in members(plan) if m.pool == p] for p in ("P", "N")}
    found = {p: [pooled[label] for label in labels if label in pooled] for p, labels in names.items()}
    return {
        "made": time.strftime("%Y-%m-%d"), "plan": {**plan.settings(), "audit": None}, "versions": versions(),
        "faithful": FAITHFUL, "models": len(made), "unlearned": [c["label"] for c in changed],
        "left_out": sorted({d.name for d in done} - {c["label"] for c in changed}),
        "metrics": table(found, [{k: v for k, v in c.items() if k != "label"} for c in changed]),
    }  # fmt: skip


def _write(plan: Plan, wanted: Mapping[str, Mapping[str, Sequence[Record]]]) -> dict[str, Path]:
    folder = plan.out / "data"
    folder.mkdir(exist_ok=True)
    files = {}
    for pool, kinds in wanted.items():
        for kind, records in kinds.items():
            if records:
                rows = [_row(r) for r in records]
                files[f"{pool}-{kind}"] = path = folder / f"{pool}-{kind}.jsonl"
                write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return files


def _row(r: Record) -> dict[str, str]:
    held = {"id": r.id, "subject": r.cluster}
    return {**held, "text": r.answer} if r.is_text else {**held, "question": r.prompt, "answer": r.answer}


def _trained(plan: Plan, member: Member, files: Mapping[str, Path], every: Sequence[str]) -> Path:
    out = plan.out / "models" / member.label
    if training.finished(out):
        return out
    own = files.get(f"{member.pool}-{member.kind}")
    schedule = {"name": "fixed", "lr": member.lr, "epochs": member.epochs, "batch": 16, "warmup": 1, "weight_decay": 0.01}
    config = TrainConfig(
        model=plan.model, data=(f"people:rest?{plan.world}", *([str(own)] if own else [])), scratch=True,
        vocabulary=(f"people:all?{plan.world}", f"people:holdout?{plan.world}", plan.others, *every),
        parts={"schedule": schedule}, engine=Engine(seed=member.seed, checkpoint_every=0),
    )  # fmt: skip
    training.execute(training.plan(config), out, resume=(out / "manifest.json").is_file())
    say(f"{member.label}: trained")
    return out


def _unlearned(plan: Plan, method: str, target: Path, rest: RecordSet) -> Path | None:
    out = plan.out / "unlearned" / method
    held = (out / "manifest.json").is_file()
    if held and Run.open(out).manifest["stages"].get("unlearn", {}).get("state") == "done":
        return out
    config = UnlearnConfig(
        model=str(target), forget=f"people:forget?{plan.world}", retain=f"people:rest?{plan.world}",
        holdout=f"people:holdout?{plan.world}", method=method, engine=Engine(checkpoint_every=0),
    )  # fmt: skip
    try:
        unlearning.execute(unlearning.from_config(config), config, out, resume=held)
    except ExpungeError as error:
        say(f"{method}: FAILED: {error}")
        return None
    say(f"{method}: unlearned")
    return out


def _opened(folder: Path) -> Callable[[], Adapter]:
    return lambda: open_adapter(str(folder), TextConfig())


@dataclass(frozen=True)
class Bench:
    """What models are measured beside, and on."""

    plan: Plan
    run: Run
    target: Path
    gold: Sequence[Path]
    sets: Mapping[str, RecordSet]

    def numbers(self, stage: str, models: Sequence[AuditedModel]) -> dict[str, dict[str, float]]:
        """Numbers of models by label and key, from an audit beside the target and the retrained models; a stage of the run."""
        beside = [AuditedModel("target", "target", _opened(self.target), path=str(self.target))]
        beside += [AuditedModel(p.name, "retrained", _opened(p), path=str(p)) for p in self.gold]
        asked = self.plan.audit
        inputs = {"models": [[m.label, str(m.path)] for m in models], "audit": asked.model_dump(mode="json")}

        def work() -> dict[str, Any]:
            say(f"audit of {len(models)} models ({stage})")
            return plain(audit([*beside, *models], self.sets, asked, cache=self.plan.out / "scores"))

        found: dict[str, dict[str, float]] = self.run.stage(f"numbers-{stage}", inputs, work, [])
        return found


def plain(document: AuditDocument) -> dict[str, dict[str, float]]:
    """Values by model and key; what has none is left out."""
    draw = np.random.default_rng(0)
    return {
        m.label: {"random number": float(draw.random()), **{k: n.value for k, n in m.numbers.items() if n.value is not None}}
        for m in document.models
    }


def _changed(bench: Bench, done: Sequence[Path]) -> list[dict[str, Any]]:
    """Numbers of each unlearned model, and of a retrained one, as they are, after relearning, and rounded."""
    plan, first = bench.plan, bench.gold[0]
    records = list(bench.sets["forget"])

    def relearned(folder: Path) -> Callable[[], Adapter]:
        return lambda: _relearn(plan, _opened(folder)(), rate(_opened(bench.target)().model, 0.1), records)

    def rounded(folder: Path) -> Callable[[], Adapter]:
        return lambda: quantised(_opened(folder)(), plan.bits)

    made = [AuditedModel(f"{p.name}", "unlearned", _opened(p), path=str(p)) for p in done]
    made += [AuditedModel(f"{p.name} relearned", "unlearned", relearned(p), path=str(p)) for p in (*done, first)]
    made += [AuditedModel(f"{p.name} rounded", "unlearned", rounded(p), path=str(p)) for p in done]
    numbers = bench.numbers("changed", made)
    useful = numbers["target"]["retain.probability"]
    ret = {"ret_before": numbers[first.name], "ret_relearned": numbers[f"{first.name} relearned"]}
    return [
        {
            "label": p.name, "before": numbers[p.name], "relearned": numbers[f"{p.name} relearned"],
            "rounded": numbers[f"{p.name} rounded"], **ret,
        }
        for p in done
        if numbers[p.name]["retain.probability"] >= (1 - LOST) * useful
    ]  # fmt: skip


def _relearn(plan: Plan, adapter: Adapter, lr: float, records: Sequence[Record]) -> Adapter:
    """The adapter itself, fine-tuned for a few steps on the forget set."""
    schedule = Fixed(lr=lr, steps=plan.steps, epochs=None, batch=16, warmup=0, decay="constant", weight_decay=0)
    examples = [adapter.encode(r) for r in records]
    train(adapter, relearning(schedule), {Stream.RETAIN: examples}, Engine(checkpoint_every=0, device="cpu"))
    return adapter


_STARTED = time.perf_counter()


def say(text: str) -> None:
    """A line with the time since the start, on standard error."""
    sys.stderr.write(f"[{time.perf_counter() - _STARTED:7.0f} s] {text}\n")
    sys.stderr.flush()


def main(words: Sequence[str] | None = None) -> int:
    """Run the experiment; write the page and the file that reports read."""
    parser = argparse.ArgumentParser(prog="python -m experiments.meta_evaluation", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/meta"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="Markdown file for the tables")
    parser.add_argument("--data", type=Path, help="JSON file that reports read")
    parser.add_argument("--each", type=int, default=Plan(Path()).each, help="models in each pool")
    given = parser.parse_args(words)
    found = experiment(Plan(given.out, each=given.each))
    from experiments.meta_page import write_page  # it imports this module

    write_text(given.data or given.out / "trusted.json", json.dumps(found, indent=1) + "\n")
    write_page(found, given.page or given.out / "page.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
