"""The page of results of :mod:`experiments.llm_methods`: ``llm_page.md`` filled with what the run folders hold so far."""

from __future__ import annotations

import itertools
import json
import math
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lines import Line, listed, number, row, spread
from experiments.llm_claims import AT, SECONDS, Claim, claims
from experiments.llm_measures import GOLD, TARGET, TELLING, detectable, lines_of, measured
from experiments.llm_methods import OWN_SCHEDULE, RANGES, SUBSTITUTE, Plan, done, language_methods, left_out, measured_on
from experiments.ship import origin_of, write
from experiments.tofu_page import PACKAGES, parameters
from expunge.audit.document import AuditDocument
from expunge.audit.metrics.forget_quality import log10_floor
from expunge.core.errors import InputError
from expunge.core.files import write_text
from expunge.core.results import Verdict
from expunge.core.runs import Run
from expunge.core.settings import describe_value
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS
from expunge.pipeline.audit import DOCUMENT
from expunge.pipeline.audit import read as read_audit
from expunge.pipeline.sweep_document import MethodSweep, SweepDocument
from expunge.pipeline.sweep_result import read as read_sweep
from expunge.pipeline.tuned import USED, read_used
from expunge.report.text import DASH, MINUS, duration

#: heading, key of the value, decimals
COLUMNS = (
    ("distance", "distance", 3), ("forget probability", "forget.probability", 3), ("forget quality (p)", "forget-quality", 3),
    ("KS distance", "forget-quality.d", 2), ("model utility", "model-utility", 3), ("PrivLeak (Min-K)", "privleak.min-k", 1),
    ("relearning area", "relearn.area", 2), ("share before it", "relearn.start", 2),
    ("broken forget answers", "forget.degenerate", 2), ("seconds", "seconds", 1), ("peak MiB", "memory", 0),
)  # fmt: skip
#: of every seed: with the interval over items where the audit gives one
SINGLE = (
    ("distance", "distance", 3), ("forget probability", "forget.probability", 3), ("forget quality (p)", "forget-quality", 4),
    ("KS distance", "forget-quality.d", 2), ("model utility", "model-utility", 3), ("PrivLeak (Min-K)", "privleak.min-k", 1),
    ("relearning area", "relearn.area", 2), ("recovered at the end", "relearn.recovered", 2),
)  # fmt: skip
NAMES = {GOLD: "*retrained (gold standard)*", TARGET: "*target (nothing unlearned)*"}
ENDS = {
    "goal": "goal", "budget": "budget", "converged": "budget", "schedule": "its own schedule", "utility": "utility bound",
    "edited": "one edit", "diverged": "diverged", "control": "its own control", "limit": "its own limit",
}  # fmt: skip
STILL = 0.01  #: a method that is no nearer to the gold standard than the target by more has moved nothing
SHORT = 220  #: characters of a message of failure


@dataclass(frozen=True)
class Found:
    """What the run folders hold so far.

    Attributes:
        plan: what was asked for.
        audits: by method, those that are done.
        sweeps: by method, those that are done.
        courses: by name, what each seed left.
        lines: of the main table.
        failed: by stage of a method, the message.
    """

    plan: Plan
    audits: Mapping[str, AuditDocument]
    sweeps: Mapping[str, SweepDocument]
    courses: Mapping[str, Sequence[Mapping[str, Any]]]
    lines: Sequence[Line]
    failed: Mapping[str, str]

    @property
    def missing(self) -> list[str]:
        """Methods of the plan without an audit."""
        return [m for m in self.plan.methods if m not in self.audits]


def gather(plan: Plan) -> Found:
    """Read the run folders; nothing is computed that they do not hold."""
    place = plan.out / "methods"
    audits = {m: read_audit(place / m / "audit") for m in plan.methods if (place / m / "audit" / DOCUMENT).is_file()}
    sweeps = {m: read_sweep(place / m / "sweep") for m in plan.methods if (place / m / "sweep" / "sweep.json").is_file()}
    held = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((plan.out / "curves").glob("*.json"))]
    files = [p for m in plan.methods for p in sorted((place / m).glob("*.failed"))] + sorted(plan.out.glob("curves/*.failed"))
    failed = {f"{p.parent.name}: {p.stem.replace('-', ' ')}": p.read_text(encoding="utf-8") for p in files}
    return Found(plan, audits, sweeps, {c["name"]: c["seeds"] for c in held}, lines_of(audits), failed)


def write_page(plan: Plan, path: Path) -> None:
    """Write the page as Markdown."""
    template = string.Template(Path(__file__).with_name("llm_page.md").read_text(encoding="utf-8"))
    found = gather(plan)
    text = template.substitute({**_setting(found), **_blocks(found)})
    write_text(path, text.replace(str(plan.out), "OUT"))


def _blocks(found: Found) -> dict[str, str]:
    lines = {line.label: line for line in found.lines}
    said = claims(lines, found.courses)
    blocks: dict[str, Iterable[str]] = {
        "outcome": _outcome(found, said), "table": _main(found), "claims": _claims(said), "courses": _courses(found),
        "seeds_table": _single(found), "sweeps": _sweeps(found), "gains": _gains(found), "ends": _ends(found),
        "verdicts": _reasons(found), "left_out": [f"- `{m}`: {why}." for m, why in sorted(left_out().items())],
        "failed": [f"- {_name(n)}: {_cut(text)}" for n, text in found.failed.items()] or ["Nothing failed."],
        "missing": _missing(found),
        "twins": _twins(found), "learnt": _learnt(found), "times": _times(found), "not_shown": _not_shown(found),
    }  # fmt: skip
    return {name: "\n".join(held) for name, held in blocks.items()}


def _setting(found: Found) -> dict[str, object]:
    plan = found.plan
    manifest = Run.open(plan.target).manifest
    schedule, records = manifest["config"]["parts"]["schedule"], manifest["inputs"]["data"]["records"]
    document = next(iter(found.audits.values()), None)
    data = document.data if document else {}
    n = data.get("forget", {}).get("records", 20 * plan.forget)
    used = {name: held["records"] for name, held in read_used(measured_on(plan) / USED).items()}
    courses = next((c for c in found.courses.values()), [])
    return {
        "asked": len(plan.methods), "audited": len(found.audits), "records": records, "retain": plan.retain,
        "standin": plan.standin, "forget": plan.forget, "goal": plan.goal, "holdout": plan.holdout, "others": plan.others,
        "model": plan.model, "parameters": f"{parameters(plan.target / 'model'):,}", "epochs": schedule["epochs"],
        "lr": f"{schedule['lr']:g}", "decay": f"{schedule['weight_decay']:g}", "batch": schedule["batch"],
        "retrained": ", ".join(map(str, plan.retrained)), "seeds": ", ".join(map(str, plan.seeds)), "trials": plan.trials,
        "rule": plan.rule, "rule_text": next((s.rule_text for s in found.sweeps.values()), plan.rule),
        "parts": _schedule(plan.parts),
        "own": "; ".join(f"`{m}` with {_schedule(p)}" for m, p in OWN_SCHEDULE.items()),
        "ranges": "; ".join(f"`--search \"{k}={v}\"`" for held in RANGES.values() for k, v in held.items()),
        "audited_sets": ", ".join(f"{held['records']} of {name.replace('_', ' ')}" for name, held in data.items()),
        "used": ", ".join(f"{count} of {name}" for name, count in used.items()),
        "n": n, "floor": f"{log10_floor(n):.1f}".replace("-", MINUS), "shift": f"{detectable(n):.2f}", "at": f"{AT:g}",
        "ten": f"{SECONDS:g}", "substitute": SUBSTITUTE, "telling": "; ".join(TELLING.values()), "limit": f"{plan.limit:.0f}",
        "rate": f"{courses[0]['lr']:.1e}".replace("-", MINUS) if courses else DASH, "course": plan.curve,
        "looks": ", ".join(map(str, plan.curve.looks)) if plan.curve else DASH,
        "relative": f"{plan.curve.relative:g}" if plan.curve else DASH,
        "cpus": manifest["machine"]["cpus"], "command": _command(plan),
        "versions": ", ".join(f"{n} {manifest['versions'][n]}" for n in PACKAGES if n in manifest["versions"]),
    }  # fmt: skip


def _schedule(parts: Mapping[str, Any]) -> str:
    return ", ".join(f"`schedule.{k}={v}`" for k, v in parts.get("schedule", {}).items())


def _command(plan: Plan) -> str:
    words = ["OMP_NUM_THREADS=1 python -m experiments.llm_methods --data FOLDER"]
    words.append("--out runs/llm-methods --page docs/results/llm-methods.md --tuned src/expunge/methods/tuned/tofu-small")
    if set(plan.methods) != set(language_methods()):
        words.append("--methods " + " ".join(plan.methods))
    return " \\\n  ".join(words)


# ---- tables


def _outcome(found: Found, said: Sequence[Claim]) -> Iterator[str]:
    runs = [m for d in found.audits.values() for m in d.models if m.role == "unlearned"]
    counts = Counter(m.judgement.verdict for m in runs if m.judgement)
    ended = ", ".join(f"{counts[v]} {v.value}" for v in Verdict if counts[v])
    yield f"- {len(found.audits)} of {len(found.plan.methods)} methods were run and audited, {len(runs)} runs: {ended or 'none'}."
    methods = [line for line in found.lines if line.label not in NAMES]
    floor = next((line for line in found.lines if line.label == GOLD), None)
    target = next((line for line in found.lines if line.label == TARGET), None)
    if methods and floor and target:
        near = [f"`{line.label}` {spread(line.values['distance'], 3)}" for line in methods[:5]]
        yield f"- Nearest to the gold standard (whose own distance is {spread(floor.values['distance'], 3)}, the target's"
        yield f"  {spread(target.values['distance'], 3)}): {', '.join(near)}."
        apart = sum(max(a.values["distance"]) < min(b.values["distance"]) for a, b in itertools.pairwise(methods))
        yield f"- Of {len(methods) - 1} pairs of neighbours in that order, the seeds of {apart} do not overlap."
        bound = target.mean("distance") - STILL
        still = [line.label for line in methods if min(line.values["distance"]) >= bound]
        yield f"- No seed nearer than the target by {STILL:g}: {listed(still)}."
    held = Counter(c.outcome for c in said)
    yield f"- Claims: {held['held']} held, {held['not held']} not held, {held['cannot be told here']} cannot be told here."
    tuned = [m for m, s in found.sweeps.items() if s.methods[0].chosen]
    yield f"- The sweep chose other settings than the method's own for {len(tuned)} of {len(found.sweeps)} methods."


def _twins(found: Found) -> Iterator[str]:
    """Methods of one and the same recipe: their difference is what the draws of two sweeps leave to chance."""
    lines = {line.label: line for line in found.lines if line.label in METHODS.names()}
    specs = {name: {**build(name).spec(), "name": METHODS.get(name).alternatives} for name in lines}
    for first, second in itertools.combinations(lines, 2):
        if specs[first] == specs[second]:
            ways = " and ".join(f"`{n}` {spread(lines[n].values['distance'], 3)}" for n in (first, second))
            yield f"- *Chance in the sweeps.* Two names stand for one recipe here, and differ in what their sweeps drew: {ways}."


def _main(found: Found) -> Iterator[str]:
    yield row(["model", "verdict", *(heading for heading, _, _ in COLUMNS)])
    yield row(["---", "---", *["---:"] * len(COLUMNS)])
    for line in found.lines:
        name, cells = NAMES.get(line.label, f"`{line.label}`"), [spread(line.values.get(k, ()), p) for _, k, p in COLUMNS]
        yield row([name, _verdicts(found, line.label), *cells])


def _verdicts(found: Found, label: str) -> str:
    """Of all seeds: such as "2 suppressed, 1 damaged"."""
    document = found.audits.get(label) or next(iter(found.audits.values()))
    role = {GOLD: "retrained", TARGET: "target"}.get(label, "unlearned")
    counts = Counter(m.judgement.verdict.value for m in document.models if m.judgement and m.role == role)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {v}" for v, n in counts.most_common()) or "not judged"


def _claims(said: Sequence[Claim]) -> Iterator[str]:
    yield row(["claim", "paper", "setting here", "outcome", "values"])
    yield row(["---"] * 5)
    for claim in said:
        yield row(
            [claim.claim, f"[{claim.paper.title}]({claim.paper.url})", claim.setting, f"**{claim.outcome}**", claim.numbers]
        )


def _courses(found: Found) -> Iterator[str]:
    if not found.courses:
        yield "No course has been run."
        return
    looks = [int(look["step"]) for look in next(iter(found.courses.values()))[0]["looks"]]
    asked = {"Probability of answers to forget": "forget.probability", "Probability of kept answers": "retain.probability"}
    for heading, key in asked.items():
        yield f"{heading}, mean of {len(next(iter(found.courses.values())))} seeds, by step:"
        yield ""
        yield row(["recipe", *map(str, looks)])
        yield row(["---", *["---:"] * len(looks)])
        for name, seeds in found.courses.items():
            means = np.mean([[look[key] for look in s["looks"]] for s in seeds], axis=0)
            yield row([f"`{name}`", *(number(float(v), 3) for v in means)])
        yield ""
    yield "Share of answers that are no language after the last step, each seed:"
    yield ""
    yield row(["recipe", "to forget prompts", "to kept prompts"])
    yield row(["---", "---:", "---:"])
    for name, seeds in found.courses.items():
        shares = [", ".join(number(s["answers"][n]["degenerate"], 2) for s in seeds) for n in ("forget", "retain")]
        yield row([f"`{name}`", *shares])


def _single(found: Found) -> Iterator[str]:
    yield row(["run", "verdict", *(heading for heading, _, _ in SINGLE)])
    yield row(["---", "---", *["---:"] * len(SINGLE)])
    order = [line.label for line in found.lines]
    documents = [found.audits[m] for m in order if m in found.audits]
    for at, document in enumerate(documents):
        for model in measured(document):
            if model.entry.role != "unlearned" and at:
                continue
            verdict = model.entry.judgement.verdict.value if model.entry.judgement else "not judged"
            cells = [_interval(model.entry.numbers.get(k), model.values.get(k, math.nan), p) for _, k, p in SINGLE]
            yield row([model.entry.label, verdict, *cells])


def _interval(found: Any, value: float, places: int) -> str:
    text = number(value, places)
    if found is None or found.low is None or found.high is None:
        return text
    return f"{text} [{number(found.low, places)}, {number(found.high, places)}]"


def _sweeps(found: Found) -> Iterator[str]:
    yield row(["method", "searched", "own: distance, lost", "chosen trial", "its distance, lost", "its values", "no result"])
    yield row(["---", "---", "---:", "---:", "---:", "---", "---:"])
    for method, document in found.sweeps.items():
        one = document.methods[0]
        own, best = one.trials[0], one.trials[one.chosen] if one.chosen is not None else None
        values = " ".join(f"`{k}={describe_value(v)}`" for k, v in best.values.items()) if best else DASH
        lost = sum(t.state != "done" for t in one.trials)
        yield row([
            f"`{method}`", ", ".join(f"`{k}`" for k in one.ranges), _place(own.distance, own.lost),
            DASH if best is None else "own" if not best.index else str(best.index),
            _place(best.distance, best.lost) if best else DASH, values or "the method's own", str(lost) if lost else DASH,
        ])  # fmt: skip


def _place(distance: float | None, lost: float | None) -> str:
    return DASH if distance is None or lost is None else f"{distance:.2f}, {100 * lost:.1f} %"


def _gains(found: Found) -> Iterator[str]:
    """What tuning brought on the stand-in, in numbers of methods."""
    pairs = [_pair(s.methods[0]) for s in found.sweeps.values()]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if known:
        better = [1 for a, b in known if b < a]
        first, second = (float(np.median(held)) for held in zip(*known, strict=True))
        yield f"On the stand-in the chosen setting is nearer than the method's own for {len(better)} of {len(known)} methods; the"
        yield f"median of sqrt(distance^2 + lost^2) goes from {first:.2f} to {second:.2f}, on the records that chose it."


def _pair(one: MethodSweep) -> tuple[float | None, float | None]:
    scores = [None if t.distance is None or t.lost is None else math.hypot(t.distance, t.lost) for t in one.trials]
    return scores[0], scores[one.chosen] if one.chosen is not None else None


def _ends(found: Found) -> Iterator[str]:
    yield row(["method", "why the runs ended", "steps", "goal reached"])
    yield row(["---", "---", "---", "---:"])
    for line in found.lines:
        if line.label in NAMES:
            continue
        places = [found.plan.out / "methods" / line.label / f"seed-{s}" for s in found.plan.seeds]
        results = [Run.open(p).manifest["stages"]["unlearn"]["result"] for p in places if done(p)]
        ends = Counter(ENDS.get(r["reason"], r["reason"]) for r in results)
        steps, reached = ", ".join(str(r["steps"]) for r in results), f"{ends['goal']} of {len(results)}"
        yield row([f"`{line.label}`", ", ".join(f"{n} {e}" for e, n in ends.most_common()), steps, reached])


def _reasons(found: Found) -> Iterator[str]:
    """The first seed's reason: those of the others are alike or stand in the audits."""
    for line in found.lines:
        document = found.audits.get(line.label)
        model = next((m for m in document.models if m.role == "unlearned" and m.judgement), None) if document else None
        if model and model.judgement:
            yield f"- `{model.label}`: {model.judgement.verdict.value}. {model.judgement.reason}"


def _missing(found: Found) -> Iterator[str]:
    few = [m for m, d in found.audits.items() if sum(x.role == "unlearned" for x in d.models) < len(found.plan.seeds)]
    if found.missing:
        yield f"Without an audit, since they failed or time ran out: {listed(found.missing)}."
    if few:
        yield f"With fewer than {len(found.plan.seeds)} seeds: {listed(few)}."
    unswept = [m for m in found.audits if m not in found.sweeps]
    if unswept:
        yield f"Run with their own settings, since the sweep failed or had nothing to search: {listed(unswept)}."
    usual = Counter(tuple(sorted(d.protocol)) for d in found.audits.values()).most_common(1)
    later = [m for m, d in found.audits.items() if tuple(sorted(d.protocol)) != usual[0][0]]
    if later:
        yield f"Added later, and audited by another version of the audit, which has more to measure: {listed(later)}."
    if not found.missing and not few and not unswept and not later:
        yield "Every method has its sweep, all seeds, and an audit."


def _learnt(found: Found) -> Iterator[str]:
    stages = Run.open(found.plan.out).manifest["stages"]
    yield row(["model", "records", "loss per token", "exact match"])
    yield row(["---", "---:", "---:", "---:"])
    for name, entry in stages.items():
        if name.startswith("learnt-"):
            held = entry["result"]
            cells = [str(held["records"]), f"{held['loss_token']:.4f}", f"{100 * held['exact']:.1f} %"]
            yield row([name.removeprefix("learnt-"), *cells])


def _times(found: Found) -> Iterator[str]:
    plan = found.plan
    models = [plan.target, *(plan.out / f"retrained-{s}" for s in plan.retrained), plan.out / "without-standin"]
    spent = {
        "training": sum(Run.open(p).manifest["stages"]["train"]["seconds"] for p in models),
        "courses": sum(c["seconds"] for held in found.courses.values() for c in held),
        "sweeps": sum(t.cost.get("seconds", 0.0) for s in found.sweeps.values() for t in s.methods[0].trials),
        "runs": sum(m.cost["seconds"] for d in found.audits.values() for m in d.models if m.role == "unlearned"),
        "audits": sum(d.cost["seconds"] for d in found.audits.values()),
    }
    yield row(["stage", "time"])
    yield row(["---", "---:"])
    for name, seconds in {**spent, "all": sum(spent.values())}.items():
        yield row([name, duration(seconds)])


def _not_shown(found: Found) -> Iterator[str]:
    lines = dict.fromkeys(line for d in found.audits.values() for line in d.not_shown)
    yield from (f"- {line}" for line in lines)


def _name(stage: str) -> str:
    method, _, what = stage.partition(": ")
    return f"`{method}`, {what}"


def _cut(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) <= SHORT else f"{flat[:SHORT]} ..."


# ---- settings


def write_settings(plan: Plan, folder: Path) -> None:
    """Write what the sweeps chose as a set that is shipped."""
    documents = gather(plan).sweeps
    first = next(iter(documents.values()), None)
    if first is None:
        raise InputError("No sweep has ended.", "Run the experiment first.")
    origin = origin_of(
        "experiments.llm_methods", first, data=f"TOFU: {plan.retain} authors of retain90 kept, the next {plan.standin} forgotten",
        model=f"{plan.model}, {parameters(plan.target / 'model'):,} parameters",
        budget=", ".join(f"schedule.{k}={v}" for k, v in plan.parts.get("schedule", {}).items()),
    )  # fmt: skip
    title = "Settings for a small model of a part of TOFU, for every method that serves language models"
    write(folder, {m: plan.out / "methods" / m / "sweep" for m in documents}, documents, title, origin)
