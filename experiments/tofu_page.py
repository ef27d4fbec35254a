"""The page of results of :mod:`experiments.tofu_small`: ``tofu_page.md`` filled with what the run folders hold."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lines import row
from experiments.tofu_small import Plan, Result
from expunge.audit.document import ModelEntry
from expunge.core.files import write_text
from expunge.core.results import Number, Verdict
from expunge.core.runs import Run
from expunge.report.text import DASH, MINUS, duration

#: heading, key of the number, decimals
COLUMNS = (
    ("forget loss", "forget.loss", 2),
    ("forget probability", "forget.probability", 3),
    ("forget ROUGE-L", "forget.rouge-l-recall", 3),
    ("truth ratio score", "forget.truth-ratio", 3),
    ("forget quality", "forget-quality", 3),
    ("model utility", "model-utility", 3),
    ("PrivLeak (Min-K)", "privleak.min-k", 1),
    ("relearning: recovered", "relearn.recovered", 2),
)
UTILITY = tuple(
    (f"{name.replace('_', ' ')} {heading}", f"{name}.{kind}", 3)
    for name, first in (("retain", "probability"), ("real_authors", "option-probability"), ("world_facts", "option-probability"))
    for heading, kind in (("probability", first), ("ROUGE-L", "rouge-l-recall"), ("truth ratio", "truth-ratio"))
)
REASONS = {
    "goal": "Reached the goal, the loss of unseen text",
    "budget": "Spent the budget before the goal",
    "converged": "Spent the budget (nothing to reach: no term on the forget set, or the weights are changed at the end)",
    "utility": "Stopped at the bound on the retain loss; the last weights within it are kept",
    "diverged": "Stopped because the loss or the gradient was not finite",
    "failed": "Failed",
}
PACKAGES = ("python", "expunge", "torch", "transformers", "tokenizers", "accelerate", "numpy", "scipy")


def write_page(result: Result, path: Path) -> None:
    """Write the page as Markdown."""
    template = string.Template(Path(__file__).with_name("tofu_page.md").read_text(encoding="utf-8"))
    write_text(path, template.substitute({**_setting(result), **_findings(result)}))


def _setting(result: Result) -> dict[str, object]:
    plan = result.plan
    target = Run.open(plan.out / "target").manifest
    trained, schedule = result.learnt["target"], target["config"]["parts"]["schedule"]
    return {
        "methods": len({m for m, _ in plan.runs}), "records": trained["records"], "tokens": f"{trained['tokens']:,}",
        "retain_authors": plan.retain, "forget_authors": plan.forget, "questions": 20 * (plan.retain + plan.forget),
        "forget_records": result.document.data["forget"]["records"], "goal_authors": plan.goal, "holdout_authors": plan.holdout,
        "model": plan.model, "parameters": f"{parameters(plan.out / 'target' / 'model'):,}", "epochs": schedule["epochs"],
        "batch": schedule["batch"], "lr": f"{schedule['lr']:g}", "decay": f"{schedule['weight_decay']:g}",
        "seeds": ", ".join(map(str, plan.retrained)), "parts": f", except {dict(plan.parts)}" if plan.parts else "",
        "cpus": target["machine"]["cpus"], "command": _command(plan),
        "versions": ", ".join(f"{n} {target['versions'][n]}" for n in PACKAGES if n in target["versions"]),
    }  # fmt: skip


def _findings(result: Result) -> dict[str, str]:
    models = result.document.models
    reasons = [f"- **{m.label}**: {m.judgement.verdict.value}. {m.judgement.reason}" for m in models if m.judgement]
    blocks: dict[str, Iterable[str]] = {
        "outcome": _outcome(result), "learnt": _learnt(result.learnt), "enough": [_enough(result.learnt)],
        "table": _numbers(models, COLUMNS, full=True), "utility": _numbers(models, UTILITY, full=False),
        "stopped": _stopped(result), "reasons": reasons, "not_shown": [f"- {line}" for line in result.document.not_shown],
        "times": _times(result),
    }  # fmt: skip
    return {name: "\n".join(lines) for name, lines in blocks.items()}


def _outcome(result: Result) -> Iterator[str]:
    judged = [m for m in result.document.models if m.judgement]
    counts = Counter(m.judgement.verdict for m in judged if m.judgement and m.role == "unlearned")
    said = [f"{counts[v]} {v.value}" for v in Verdict if counts[v]]
    said += [f"{len(result.failed)} failed"] if result.failed else []
    yield f"Of {sum(counts.values()) + len(result.failed)} unlearning runs: {', '.join(said)}."
    controls = [f"{m.label} {m.judgement.verdict.value}" for m in judged if m.judgement and m.role != "unlearned"]
    yield f"Controls: {', '.join(controls)}."
    yield ""
    ended: dict[str, list[str]] = {}
    for label, found in _runs(result):
        ended.setdefault(found["reason"], []).append(label)
    for reason, heading in REASONS.items():
        if reason in ended:
            yield f"- {heading}: {'; '.join(ended[reason])}"


def _learnt(learnt: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| model | records | loss per token | mean loss per record | exact match |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, found in learnt.items():
        loss, record = found["loss_token"], found["loss_record"]
        yield f"| {name} | {found['records']} | {loss:.4f} | {record:.4f} | {100 * found['exact']:.1f} % |"


def _enough(learnt: Mapping[str, Mapping[str, Any]]) -> str:
    short = [n for n, f in learnt.items() if f["loss_token"] >= 0.1 or f["exact"] <= 0.9]
    if short:
        return f"Asked for were under 0.1 nats per token and over 90 % exact match. **Not reached by: {', '.join(short)}.**"
    return "All are under 0.1 nats per token and over 90 % exact match, which was asked of them."


def _command(plan: Plan) -> str:
    """The command that does the same; the folder of the data is the reader's own."""
    default = Plan(Path())
    words = ["OMP_NUM_THREADS=1 python -m experiments.tofu_small --data FOLDER"]
    words.append("--out runs/tofu-small --page docs/results/tofu-small.md")
    if (plan.model, plan.retain, plan.forget) != (default.model, default.retain, default.forget):
        words.append(f"--model {plan.model} --retain {plan.retain} --forget {plan.forget}")
    words.append(f"--epochs {plan.schedule['epochs']} --lr {plan.schedule['lr']:g} --decay {plan.schedule['weight_decay']:g}")
    words.append(f"--retrained {len(plan.retrained)}")
    words.append("--methods " + " ".join(m for m, seed in plan.runs if seed == 1))
    words.append("--twice " + " ".join(m for m, seed in plan.runs if seed == 2))
    return " \\\n  ".join(words)


def parameters(folder: Path) -> int:
    """Numbers in the weights of a model; tied matrices are stored, and count, once."""
    from safetensors.numpy import load_file

    return sum(tensor.size for path in folder.glob("*.safetensors") for tensor in load_file(path).values())


def _numbers(models: Sequence[ModelEntry], columns: Sequence[tuple[str, str, int]], *, full: bool) -> Iterator[str]:
    """A table of numbers; ``full`` adds verdict, intervals and cost."""
    flags: list[str] = []
    verdict, cost = (["verdict"], ["steps", "time"]) if full else ([], [])
    yield row(["model", *verdict, *(heading for heading, _, _ in columns), *cost])
    yield row(["---"] * (1 + len(verdict)) + ["---:"] * (len(columns) + len(cost)))
    for model in models:
        cells = [_cell(model.numbers.get(key), places, flags, full) for _, key, places in columns]
        if full:
            cells = [model.judgement.verdict.value if model.judgement else "not judged", *cells]
            cells += [f"{model.cost['steps']:.0f}", duration(model.cost["seconds"])]
        yield row([model.label, *cells])
    if flags:
        yield ""
        yield " ".join(f"({at}) {flag}." for at, flag in enumerate(flags, 1))


def _cell(number: Number | None, places: int, flags: list[str], interval: bool) -> str:
    if number is None or number.value is None:
        return DASH
    text = f"{number.value:.{places}f}"
    if number.value != 0 and float(text) == 0 and number.low is None:
        text = f"{number.value:.0e}"
    if interval and number.low is not None and number.high is not None:
        text += f" [{number.low:.{places}f}, {number.high:.{places}f}]"
    flags.extend(f for f in dict.fromkeys(number.flags) if f not in flags)
    marks = ",".join(str(flags.index(f) + 1) for f in dict.fromkeys(number.flags))
    return text.replace("-", MINUS) + (f" ({marks})" if marks else "")


def _stopped(result: Result) -> Iterator[str]:
    yield row(["run", "step size", "why it stopped"])
    yield row(["---", "---:", "---"])
    for label, found in _runs(result):
        size = f"{found['lr']:.1e}".replace("-", MINUS) if "lr" in found else DASH
        yield row([label, size, found["sentence"]])


def _runs(result: Result) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each run's manifest says of its end; of a failed one the reason and the message."""
    for method, seed in result.plan.runs:
        label, name = f"{method}, seed {seed}", f"{method}-{seed}"
        if name in result.failed:
            yield label, {"reason": "failed", "sentence": f"**failed**: {result.failed[name]}"}
        else:
            yield label, Run.open(result.plan.out / name).manifest["stages"]["unlearn"]["result"]


def _times(result: Result) -> Iterator[str]:
    plan = result.plan
    stages = [("target", "train"), *((f"retrained-{s}", "train") for s in plan.retrained)]
    stages += [(f"{m}-{s}", "unlearn") for m, s in plan.runs if f"{m}-{s}" not in result.failed]
    rows = [(name, Run.open(plan.out / name).manifest["stages"][stage]) for name, stage in stages]
    rows += list(result.run.manifest["stages"].items())
    yield row(["stage", "wall time", "largest memory of the process until then"])
    yield row(["---", "---:", "---:"])
    for name, entry in rows:
        yield row([name, duration(entry["seconds"]), f"{entry['peak_bytes'] / 2**20:,.0f} MiB"])
    yield row(["all", duration(sum(entry["seconds"] for _, entry in rows)), ""])
