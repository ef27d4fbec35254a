"""Every method for language models on a part of TOFU: settings swept with one budget, three seeds, audits, curves over steps.

Usage, from the repository root::

    OMP_NUM_THREADS=1 python -m experiments.llm_methods --data FOLDER --out runs/llm-methods --page docs/results/llm-methods.md

FOLDER holds TOFU's files (``forget10.json`` and the others, or a folder ``tofu`` with them). One after the other each method is
swept on a *stand-in* (authors that the request keeps), is run on the request with the settings that the sweep chose, with three
seeds that no trial had, and is audited beside the target and three retrained models, on records that no sweep was measured on.

Every stage is a run folder below ``--out``, done in a process of its own (so that its peak memory is its own) within a time
limit. What is done is not done again, a killed stage goes on where it stopped, and what failed stands as failed: in a file
``*.failed`` with the message (``--retry METHOD`` removes those of a method). Methods can be added later by the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments import llm_curves
from experiments.stages import Stages
from experiments.tofu_small import PERTURBED_RETAIN, learnt, say, told, train_once
from expunge.adapters.language import LanguageAdapter
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.core.errors import ExpungeError, InputError
from expunge.core.files import write_text
from expunge.core.runs import Run
from expunge.data.records import Record, RecordSet
from expunge.data.refusals import REFUSALS
from expunge.data.sources import load
from expunge.engine.options import Engine
from expunge.methods.catalogue import find, known, serves
from expunge.methods.edits.registry import EDITS
from expunge.methods.prepared.registry import PREPARED
from expunge.pipeline import sweep, sweep_run
from expunge.pipeline import train as training
from expunge.pipeline import unlearn as unlearning
from expunge.pipeline.audit import audit_stage, entry_of, unlearned_model
from expunge.pipeline.config import TextConfig, TrainConfig, UnlearnConfig
from expunge.pipeline.models import open_adapter
from expunge.pipeline.tuned import USED, unseen, used_text
from expunge.pipeline.validation import TextGround

#: In the order in which they are run: those that the claims are about first, then all others by name.
FIRST = (
    "gradascent", "npo", "simnpo", "graddiff", "wga", "flat", "ssu", "task-vector", "rocr", "rmu", "idk-nll", "idkdpo", "uld",
    "whp-logits", "loku", "gu", "ga-opt", "pdu", "undial", "altpo", "satimp", "kuda", "whp", "dpo",
)  # fmt: skip
#: What serves language models and is left out: why it cannot answer this request by its very definition.
LEFT_OUT = {
    "retrain": "it is the gold standard itself: the retrained models of the table",
    "au": "it looks for made-up names of packages in what the model writes, and this request is about authors",
    "backdoor": "it is an attack on audits and no way to forget",
    "codeeraser": "it forgets marked spans, and a request of whole authors marks none",
    "sani": "it tells marked spans from the rest, and a request of whole authors marks none",
    "oracle-matching": "it reads what a model says that never saw the authors: the gold standard that it is compared with",
}
#: Methods whose own schedule is not the adaptive one: the same number of examples as 120 steps of 8, where it takes a number.
OWN_SCHEDULE: dict[str, dict[str, Any]] = {
    "laf": {"schedule": {"steps": 120, "batch": 8}},
    "scrub": {"schedule": {"epochs": 3}},
    "scrub-rewind": {"schedule": {"epochs": 3}},
}
#: Ranges where a method's published step size belongs to models ten thousand times as large and its schedule finds none itself.
RANGES = {"laf": {"laf:schedule.lr": "1e-4..1e-2:log"}}
CHOSEN_FOR_SWEEP = 9  #: seed of the model retrained without the stand-in; the gold standard has others
SUBSTITUTE = "the author"  #: to which ROCR redirects the names of authors
SHORT = {"max_new_tokens": 80}


def audit_settings() -> AuditSettings:
    """What is measured of every model: scores, short answers, relearning in 20 steps at two rates, rounding to 8 and 4 bits."""
    generated = ("rouge-l-recall", "model-utility", "fluency")
    return AuditSettings(
        metrics=("probability", "truth-ratio", "forget-quality", "privleak", *generated),
        options={**dict.fromkeys(generated, SHORT), "privleak": {"attacks": ("min-k",)}},
        draws=200, samples_forget=0, samples_retain=0,
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What the experiment depends on.

    Attributes:
        out: folder of the runs.
        retain, standin: authors of retain90 that are kept; of these the last ones are what sweeps forget.
        forget: authors of forget10 to be forgotten.
        goal, holdout: authors of holdout10: the first ones tell when to stop, the next ones are for the audit.
        others: records of real_authors and of world_facts, each.
        model: preset of the model.
        schedule: of the training; retrained models use the same.
        retrained: seeds of retrained models.
        seeds: of the runs of each method.
        trials: of each method's sweep; the first is the method's own setting.
        rule: how the sweep chooses.
        parts: parts of every trial and run whose schedule is the adaptive one.
        audit: what is measured.
        curve: steps, rate and seeds of the runs whose course is measured; None: none.
        methods: names, in the order in which they are run.
        longest: answer in tokens that exact match waits for.
        limit: seconds that a stage may take.
        apart: do each stage in a process of its own.
    """

    out: Path
    retain: int = 8
    standin: int = 3
    forget: int = 5
    goal: int = 4
    holdout: int = 4
    others: int = 20
    model: str = "llama-tiny"
    schedule: Mapping[str, Any] = field(default_factory=dict)
    retrained: tuple[int, ...] = (1, 2, 3)
    seeds: tuple[int, ...] = (1, 2, 3)
    trials: int = 3
    rule: str = "balanced"
    parts: Mapping[str, Any] = field(default_factory=lambda: {"schedule": {"steps": 120, "epochs": 1, "check_examples": 32}})
    audit: AuditSettings = field(default_factory=audit_settings)
    curve: llm_curves.Course | None = field(default_factory=llm_curves.Course)
    methods: tuple[str, ...] = ()
    longest: int = 120
    limit: float = 300.0
    apart: bool = True

    @property
    def forget_source(self) -> str:
        """The request: whole authors."""
        return f"tofu:forget10?authors={self.forget}"

    @property
    def goal_source(self) -> str:
        """Unseen authors that tell when to stop."""
        return f"tofu:holdout10?authors={self.goal}"

    @property
    def target(self) -> Path:
        """Folder of the model before unlearning."""
        return self.out / "target"

    def file(self, name: str) -> str:
        """A file of records that no named set gives."""
        return str(self.out / "data" / f"{name}.jsonl")

    def parts_of(self, method: str) -> dict[str, Any]:
        """What every trial and run of a method has that its own parts have not."""
        if method in OWN_SCHEDULE:
            return OWN_SCHEDULE[method]
        return {} if method in EDITS.names() else dict(self.parts)

    def settings(self) -> dict[str, Any]:
        """What the manifest of the experiment records: all but what may be added later."""
        return {
            "retain": self.retain, "standin": self.standin, "forget": self.forget, "goal": self.goal, "holdout": self.holdout,
            "others": self.others, "model": self.model, "schedule": dict(self.schedule), "retrained": list(self.retrained),
            "trials": self.trials, "rule": self.rule, "parts": dict(self.parts),
            "audit": self.audit.model_dump(mode="json", exclude_defaults=True),
        }  # fmt: skip


def language_methods() -> list[str]:
    """Every registered method that serves language models and is not left out, those that the claims are about first."""
    fit = [n for n in known() if n not in PREPARED.names() and serves(n, LanguageAdapter.offers)[0] and n not in LEFT_OUT]
    return [n for n in FIRST if n in fit] + [n for n in fit if n not in FIRST]


def left_out() -> dict[str, str]:
    """What serves language models and is left out, with the reason."""
    prepared = {
        name: "a prepared method: it shapes the training, and is no way to change a model that has been trained"
        for name in PREPARED.names()
        if serves(name, LanguageAdapter.offers)[0]
    }
    return {**LEFT_OUT, **prepared}


def experiment(plan: Plan) -> None:
    """Do all stages, or what is left of them."""
    Run.start(plan.out, "llm-methods", plan.settings(), resume=(plan.out / "manifest.json").is_file())
    write_data(plan)
    stages = Stages(plan.limit, apart=plan.apart)
    stages.do("models", lambda: _models(plan), plan.out / "models.failed", again=True)
    if not training.finished(plan.out / f"retrained-{plan.retrained[-1]}"):
        raise InputError("The target and the retrained models are not there.", f"See {plan.out / 'models.failed'}.")
    _imports(plan)
    if plan.curve is not None:
        llm_curves.all_courses(plan.curve, _request(plan), plan.out / "curves", stages.do)
    for method in plan.methods:
        _method(plan, stages, method)


def _imports(plan: Plan) -> None:
    """Import once what every stage needs: its process then has it. Nothing may be trained here: autograd does not fork."""
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401

    open_adapter(str(plan.target), TextConfig())


def _method(plan: Plan, stages: Stages, method: str) -> None:
    """Sweep, three runs, audit; a sweep that fails leaves the method its own settings."""
    place = plan.out / "methods" / method
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "sweep" / sweep.DOCUMENT).is_file():
        stages.do(f"{method}: sweep", lambda: _sweep(plan, method), place / "sweep.failed")
    for seed in plan.seeds:
        if not done(place / f"seed-{seed}"):
            stages.do(f"{method}: seed {seed}", lambda s=seed: _unlearn(plan, method, s), place / f"seed-{seed}.failed")  # type: ignore[misc]
    if any(done(place / f"seed-{s}") for s in plan.seeds):
        stages.do(f"{method}: audit", lambda: _audit(plan, method), place / "audit.failed")


def done(folder: Path) -> bool:
    """Whether an unlearning run has ended."""
    return (folder / "manifest.json").is_file() and Run.open(folder).manifest["stages"].get("unlearn", {}).get("state") == "done"


# ---- data and models


def write_data(plan: Plan) -> None:
    """Files that no named set gives: what is kept, what sweeps forget and keep, and the refusals, whose words must be known."""
    folder = plan.out / "data"
    folder.mkdir(exist_ok=True)
    authors = load(f"tofu:retain90?authors={plan.retain + plan.standin}", name="retain")
    names = list(dict.fromkeys(authors.clusters()))
    others = [r for n in ("real_authors", "world_facts") for r in load(f"tofu:{n}", name=n)[: plan.others]]
    rest = [r for r in authors if r.cluster in names[: plan.retain]] + others
    standin = [r for r in authors if r.cluster in names[plan.retain :]]
    sets = {"rest": rest, "standin": standin, "retain": [*rest, *standin]}
    rows = {name: [_row(r) for r in held] for name, held in sets.items()} | {"refusals": [{"text": text} for text in REFUSALS]}
    for name, held in rows.items():
        write_text(Path(plan.file(name)), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held))


def _row(record: Record) -> dict[str, Any]:
    return {"id": record.id, "subject": record.cluster, "question": record.prompt, "answer": record.answer}


def audit_sets(plan: Plan) -> dict[str, RecordSet]:
    """What is audited, before the records that sweeps measured on are left out."""
    whole = {
        "forget": f"tofu:forget10_perturbed?authors={plan.forget}",
        "retain": f"tofu:retain_perturbed?authors={min(plan.retain, PERTURBED_RETAIN)}",
    }
    sets = {name: load(source, name=name) for name, source in whole.items()}
    for name in ("real_authors", "world_facts"):
        held = load(f"tofu:{name}_perturbed", name=name)
        sets[name] = RecordSet(name, tuple(held[: plan.others]), held.source)
    held = load(f"tofu:holdout10?authors={plan.goal + plan.holdout}", name="holdout")
    seen = set(load(plan.goal_source, name="goal").clusters())
    sets["holdout"] = RecordSet("holdout", tuple(r for r in held if r.cluster not in seen), held.source)
    return sets


def training_config(plan: Plan) -> TrainConfig:
    """How the target was made."""
    words = [f"tofu:{n}?authors={a}" for n, a in (("forget10_perturbed", plan.forget), ("retain_perturbed", plan.retain))]
    return TrainConfig(
        model=plan.model, data=(plan.file("retain"), plan.forget_source),
        vocabulary=(*words, f"tofu:holdout10?authors={plan.goal + plan.holdout}", plan.file("refusals")),
        scratch=True, parts={"schedule": dict(plan.schedule)}, engine=Engine(checkpoint_every=0),
    )  # fmt: skip


def _models(plan: Plan) -> None:
    """The target, the gold standard, the model that trials are compared with, and what all of them have learnt."""
    run, config = Run.open(plan.out), training_config(plan)
    train_once(config, plan.target)
    forget = load(plan.forget_source, name="forget")
    standin = load(plan.file("standin"), name="standin")
    asked = [(forget, s, f"retrained-{s}") for s in plan.retrained] + [(standin, CHOSEN_FOR_SWEEP, "without-standin")]
    for gone, seed, name in asked:
        train_once(training.retraining(config, gone, seed)[0], plan.out / name)
    for name in ("target", *(name for _, _, name in asked)):
        what = learnt(run, plan.out / name, plan.longest)
        say(f"{name}: loss per token {what['loss_token']:.4f}, exact match {what['exact']:.1%} of {what['records']} records")


# ---- sweep, run, audit


def _request(plan: Plan) -> dict[str, Any]:
    """The request as an unlearning run takes it, without a method."""
    return {
        "model": str(plan.target), "forget": plan.forget_source, "retain": plan.file("retain"), "holdout": plan.goal_source,
        "engine": {"checkpoint_every": 0},
    }  # fmt: skip


def sweep_config(plan: Plan, method: str) -> sweep.SweepConfig:
    """The sweep of a method, on the stand-in."""
    forget = plan.file("standin")
    parts = {**plan.parts_of(method), **given(method, forget)}
    request = {**_request(plan), "forget": forget, "retain": plan.file("rest"), "parts": parts}
    return sweep.SweepConfig(
        request=request, methods=(method,), trials=plan.trials, split={"forget_share": 1.0}, rule=plan.rule,  # type: ignore[arg-type]
        retrained=(str(plan.out / "without-standin"),), search=RANGES.get(method, {}),
    )  # fmt: skip


def names(records: Sequence[Record]) -> list[str]:
    """The name of each author: the run of capitalised words that stands most often in the questions and answers about it."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        texts = re.findall(r"[A-Z][\w-]+(?: [A-Z][\w-]+)+", f"{record.prompt} . {record.answer}")
        found.setdefault(record.cluster, Counter()).update(texts)
    return [held.most_common(1)[0][0] for held in found.values()]


def given(method: str, source: str) -> dict[str, Any]:
    """Parts that a method cannot do without and that the request gives: ROCR is told which names lead where."""
    if method != "rocr":
        return {}
    return {"subjects": names(load(source, name="forget").records), "substitute": SUBSTITUTE, "contexts": "records"}


def _sweep(plan: Plan, method: str) -> None:
    out = plan.out / "methods" / method / "sweep"
    made = sweep.plan(sweep_config(plan, method))
    sweep_run.execute(made, out, resume=(out / "manifest.json").is_file(), hands=sweep_run.Hands(workers=1))


def chosen(plan: Plan, method: str) -> dict[str, Any]:
    """Parts and origin of the settings that a method's sweep chose; its own where there are none."""
    place = plan.out / "methods" / method / "sweep"
    file = place / sweep.CHOSEN
    asked = given(method, plan.forget_source)
    if not (place / sweep.DOCUMENT).is_file() or not file.is_file():
        return {"parts": {**plan.parts_of(method), **asked}}
    held = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {"parts": {**held.get("parts", {}), **asked}, "tuned": held["tuned"]}


def _unlearn(plan: Plan, method: str, seed: int) -> None:
    request = _request(plan)
    config = UnlearnConfig(**{**request, **chosen(plan, method), "method": method, "engine": {**request["engine"], "seed": seed}})
    out = plan.out / "methods" / method / f"seed-{seed}"
    resume = (out / "manifest.json").is_file()
    unlearning.execute(unlearning.from_config(config), config, out, resume=resume, progress=told(f"{method}, seed {seed}"))


def measured_on(plan: Plan) -> Path:
    """Folder with the list of the records that every sweep is measured on: all divide the same request by the same seed."""
    folder = plan.out / "measured"
    if not (folder / USED).is_file():
        config = sweep_config(plan, FIRST[0])
        ground = TextGround(UnlearnConfig(**config.request), config.split)
        folder.mkdir(exist_ok=True)
        write_text(folder / USED, used_text(ground.used()))
    return folder


def _audit(plan: Plan, method: str) -> None:
    audit_runs(plan, method, "audit", plan.seeds, plan.audit)


def audit_runs(plan: Plan, method: str, name: str, seeds: Sequence[int], settings: AuditSettings) -> None:
    """Audit the finished runs of a method beside the target and the gold standard, as a run folder ``name`` beside them.

    The records that any sweep was measured on are left out.
    """
    place = plan.out / "methods" / method
    out = place / name
    run = Run.start(out, f"llm-methods-{name}", {"method": method}, resume=(out / "manifest.json").is_file())
    sets, notes = unseen(place, None, audit_sets(plan), leave_out=str(measured_on(plan)))
    models: list[AuditedModel] = [entry_of("target", "target", plan.target, TextConfig(), seed=0, stage="train")]
    for seed in plan.retrained:
        folder = plan.out / f"retrained-{seed}"
        models.append(entry_of(f"retrained seed {seed}", "retrained", folder, TextConfig(), seed=seed, stage="train"))
    runs = [place / f"seed-{s}" for s in seeds if done(place / f"seed-{s}")]
    models += [unlearned_model(r, f"{method}, {r.name.replace('-', ' ')}") for r in runs]
    audit_stage(run, models, sets, settings, progress=told(f"{method}: {name}"), title=method, notes=notes)


# ---- command line


def parse(words: Sequence[str] | None = None) -> tuple[Plan, argparse.Namespace]:
    """The plan that the command line gives."""
    default = Plan(Path())
    parser = argparse.ArgumentParser(prog="python -m experiments.llm_methods", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of TOFU's files; else EXPUNGE_DATA, else the hub")
    parser.add_argument("--out", type=Path, default=Path("runs/llm-methods"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="Markdown file for the tables")
    parser.add_argument("--tuned", type=Path, help="folder for the settings that the sweeps chose")
    parser.add_argument("--only-page", action="store_true", help="run nothing: write the page from what there is")
    parser.add_argument("--methods", nargs="+", help="methods; none given: all that serve language models")
    parser.add_argument("--retry", nargs="*", default=[], metavar="METHOD", help="try again what failed of these")
    parser.add_argument("--trials", type=int, default=default.trials, help="trials of each sweep")
    parser.add_argument("--epochs", type=int, default=50, help="passes of the training")
    parser.add_argument("--lr", type=float, default=5e-3, help="largest learning rate of the training")
    parser.add_argument("--limit", type=float, default=default.limit, help="seconds that a stage may take")
    given = parser.parse_args(words)
    if given.data:
        os.environ["EXPUNGE_DATA"] = str(given.data)
    schedule = {"name": "fixed", "lr": given.lr, "epochs": given.epochs, "batch": 16, "warmup": 1, "weight_decay": 0.5}
    methods = tuple(given.methods or language_methods())
    for method in methods:
        find(method)
    return Plan(given.out, schedule=schedule, trials=given.trials, methods=methods, limit=given.limit), given


def main(words: Sequence[str] | None = None) -> int:
    """Run the experiment, write the page."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning in each process
    try:
        plan, given = parse(words)
        for method in given.retry:
            for file in (plan.out / "methods" / method).glob("*.failed"):
                file.unlink()
        if not given.only_page:
            experiment(plan)
        from experiments.llm_page import write_page, write_settings  # they import this module

        write_page(plan, given.page or plan.out / "page.md")
        if given.tuned:
            write_settings(plan, given.tuned)
    except ExpungeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
