"""Guards beside methods that change weights: the runs of :mod:`experiments.llm_methods`, and every guard before the same target.

Usage, from the repository root, after that experiment::

    OMP_NUM_THREADS=1 python -m experiments.guards --data FOLDER --out runs/llm-methods --page PAGE.md

All are judged by served-v1, with the access of somebody who only asks: answers, log-probabilities of answers, prompts. Guards are
fitted on the request alone (forget and retain records), with their published or default settings; nothing is swept. Each audit is
a run folder (``guards/NAME``): what is done is not done again, what failed stands as failed.
"""

from __future__ import annotations

import argparse
import os
import string
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.llm_methods import Plan, audit_sets, done, told
from experiments.stages import Stages
from experiments.verdicts import between, link, ordered
from expunge.audit.document import AuditDocument, ModelEntry
from expunge.audit.run import AuditedModel
from expunge.audit.settings import AuditSettings
from expunge.core.files import write_text
from expunge.core.runs import Run
from expunge.guards.named import GUARDS
from expunge.pipeline.audit import DOCUMENT, audit_stage, entry_of, read, unlearned_model
from expunge.pipeline.config import TextConfig, UnlearnConfig
from expunge.pipeline.unlearn import execute, from_config
from expunge.report.text import DASH

PROTOCOL = "served-v1"
RECIPES = ("npo", "graddiff", "simnpo", "rmu", "uld", "ga-opt")  #: of the runs that are judged beside the guards
NEEDS_MORE = {
    "neuron-adjust": "it hides skills, not facts: [results on skills](skills.md)",
    "key-space": "it hides skills, not facts: [results on skills](skills.md)",
    "in-context": "the model must be taught the tag first",
    "alu": "its agents need a model that follows instructions",
}
PARTS = {"eco": {"detector": {"rate": 0.05}}, "guard": {"detector": {"rate": 0.05}}}
#: of guards whose defaults ask for more ordinary prompts than there are: one false alarm in twenty instead of one in a hundred


@dataclass(frozen=True)
class Course:
    """What is judged.

    Attributes:
        plan: of the experiment whose target, retrained models and runs they are.
        guards: names.
        recipes: methods with a run of seed 1.
    """

    plan: Plan
    guards: tuple[str, ...]
    recipes: tuple[str, ...] = RECIPES

    @property
    def folder(self) -> Path:
        """Where the runs of guards are."""
        return self.plan.out / "guards"


def guard_run(course: Course, name: str) -> Path:
    """Put a guard before the target, as a run."""
    out = course.folder / name / "run"
    if not done(out):
        plan = course.plan
        config = UnlearnConfig(
            model=str(plan.target), forget=plan.forget_source, retain=plan.file("retain"), method=name, parts=PARTS.get(name, {})
        )
        execute(from_config(config), config, out, resume=out.exists())
    return out


def judged(course: Course, name: str, runs: Sequence[AuditedModel]) -> None:
    """Audit models beside the target and the gold standard, with the access of somebody who asks."""
    plan, out = course.plan, course.folder / name / "audit"
    run = Run.start(out, "guards-audit", {"name": name}, resume=(out / "manifest.json").is_file())
    models = [entry_of("target", "target", plan.target, TextConfig(), seed=0, stage="train")]
    models += [
        entry_of(f"retrained seed {s}", "retrained", plan.out / f"retrained-{s}", TextConfig(), seed=s, stage="train")
        for s in plan.retrained
    ]
    settings = AuditSettings.under(PROTOCOL, samples_forget=0, samples_retain=0)
    audit_stage(run, [*models, *runs], audit_sets(plan), settings, progress=told(name), title=name)


def experiment(course: Course, stages: Stages) -> None:
    """Run and audit every guard, and audit the recipes' runs in the same way."""
    for name in course.guards:
        stages.do(
            name, lambda n=name: judged(course, n, [unlearned_model(guard_run(course, n), n)]), course.folder / f"{name}.failed"
        )  # type: ignore[misc]
    runs = [p for m in course.recipes if done(p := course.plan.out / "methods" / m / "seed-1")]
    if runs:
        models = [unlearned_model(p, p.parent.name) for p in runs]
        stages.do("recipes", lambda: judged(course, "recipes", models), course.folder / "recipes.failed")


# ---- the page


def found(course: Course) -> tuple[dict[str, AuditDocument], dict[str, str]]:
    """Audits by name, and what failed."""
    held, failed = {}, {}
    for name in (*course.guards, "recipes"):
        if (course.folder / name / "audit" / DOCUMENT).is_file():
            held[name] = read(course.folder / name / "audit")
        elif (course.folder / f"{name}.failed").is_file():
            failed[name] = (course.folder / f"{name}.failed").read_text(encoding="utf-8").strip()
    return held, failed


def write_page(course: Course, path: Path) -> None:
    """Write the page from what there is."""
    held, failed = found(course)
    template = string.Template(Path(__file__).with_name("guards_page.md").read_text(encoding="utf-8"))
    write_text(path, template.substitute(gaps(course, held, failed)))


def gaps(course: Course, held: Mapping[str, AuditDocument], failed: Mapping[str, str]) -> dict[str, str]:
    """What the template leaves open."""
    guards = [e for n in course.guards if n in held for e in held[n].models if e.role == "unlearned"]
    recipes = [e for e in held["recipes"].models if e.method in course.recipes] if "recipes" in held else []
    first = next(iter(held.values()))
    controls = [e for e in first.models if e.role != "unlearned"]
    return {
        "sets": ", ".join(f"{d['records']} records in the {n.replace('_', ' ')} set" for n, d in first.data.items()),
        "guards": table(ordered(guards)), "refused": refused(ordered(guards)),
        "recipes": table(ordered(recipes)), "controls": table(controls),
        "failed": "\n".join(f"- `{m}`: {why}" for m, why in failed.items()) or "Nothing failed.",
        "left_out": "\n".join(f"- `{n}`: {why}" for n, why in NEEDS_MORE.items() if n in GUARDS.names()) or "Nothing.",
    }  # fmt: skip


SAID = (  # title, number
    ("forget ROUGE-L", "forget.rouge-l-recall"), ("forget probability", "forget.probability"),
    ("paraphrased", "forget.paraphrased-question"), ("in pieces", "forget.cut-short"), ("best of samples", "forget.leak-at-k"),
    ("retain ROUGE-L", "retain.rouge-l-recall"),
)  # fmt: skip
REFUSED = tuple((n, f"{n}.refused") for n in ("forget", "retain", "holdout", "real_authors", "world_facts", "general"))
_TAKEN_APART = "attack (taken-apart)"


def table(entries: Sequence[ModelEntry]) -> str:
    """A row per model: verdict, what it says, how the ways of asking came out, and the check that carries the verdict."""
    lines = [
        f"| model | verdict | {' | '.join(title for title, _ in SAID)} | asked otherwise | weakest link |",
        f"| --- | --- | {' | '.join('---:' for _ in SAID)} | --- | --- |",
    ]
    for entry in entries:
        cells = " | ".join(between(entry, key) for _, key in SAID)
        verdict, said = (entry.judgement.verdict.value, link(entry.judgement)) if entry.judgement else (DASH, DASH)
        lines.append(f"| {entry.label} | {verdict} | {cells} | {asked_otherwise(entry)} | {said} |")
    return "\n".join(lines)


def asked_otherwise(entry: ModelEntry) -> str:
    """How the ways of asking came out that tell something: ``equivalent 1/2, knows more 1/2 (leak-at-k)``."""
    checks = entry.judgement.checks if entry.judgement else []
    tried = [
        c for c in checks if c.name.startswith("attack (") and c.name != _TAKEN_APART and c.outcome not in ("not run", "shown")
    ]
    out = []
    for outcome in dict.fromkeys(c.outcome for c in tried):
        names = [c.name.removeprefix("attack (").rstrip(")") for c in tried if c.outcome == outcome]
        told = f" ({', '.join(names)})" if outcome not in ("equivalent", "knows less") else ""
        out.append(f"{outcome} {len(names)}/{len(tried)}{told}")
    return ", ".join(out) or DASH


def refused(entries: Sequence[ModelEntry]) -> str:
    """A row per model: the share of prompts of each set that a guard answers in its place."""
    lines = [
        f"| model | {' | '.join(n.replace('_', ' ') for n, _ in REFUSED)} |",
        f"| --- | {' | '.join('---:' for _ in REFUSED)} |",
    ]
    lines += [f"| {e.label} | {' | '.join(between(e, key) for _, key in REFUSED)} |" for e in entries]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the guards, judge, write the page."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(prog="python -m experiments.guards", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of TOFU's files; else EXPUNGE_DATA, else the hub")
    parser.add_argument("--out", type=Path, default=Path("runs/llm-methods"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="Markdown file for the tables")
    parser.add_argument("--guards", nargs="+", help="names; none given: all that hide facts")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one audit may take")
    parser.add_argument("--only-page", action="store_true", help="run nothing: write the page from what there is")
    given = parser.parse_args(words)
    if given.data:
        os.environ["EXPUNGE_DATA"] = str(given.data)
    if not (given.out / "target").is_dir():
        sys.stderr.write(
            f"Error: There is no target in {str(given.out)!r}. Make it: python -m experiments.llm_methods --out {given.out}\n"
        )
        return 2
    course = Course(Plan(given.out), tuple(given.guards or [n for n in GUARDS.names() if n not in NEEDS_MORE]))
    if not given.only_page:
        experiment(course, Stages(given.limit, apart=False))
    write_page(course, given.page or given.out / "guards.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
