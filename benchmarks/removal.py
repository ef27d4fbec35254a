"""The `removal-v1` audit of the demo: one pass against metrics and attacks that each make their own; ten models against one.

The models are those of `expunge demo`: a small model that knows fictitious people, three retrained models, and what methods made
of the target. They are trained first, unless an earlier call left them in the folder. Then, in one call:

- *cold and again*: the audit of target, retrained models and one unlearned model with an empty cache, and once more with what
  that left.
- *all*: the same for the target, the retrained models and all unlearned models of the demo.
- *own passes*: the same metrics and attacks one after the other, each with passes and answers of its own, as toolkits compute
  them, on fewer models (``--compared``). Nothing is shared between two of them, nor are retrained models' scores kept. ``one``
  puts one example into a pass, finds extraction strength by one pass per prefix, and runs Min-K%++ twice; ``batched`` is
  careful: batches of 32 in the order of the data, extraction strength from one pass, and model utility and forget quality share
  the parts that they are made of. The formulas, answers and copies are the project's own, models are loaded before the clock
  starts, and no verdict is reached. All numbers of both sides must be equal.
- *ten*: ten unlearned models (those of the demo and mixtures of their weights with the target's) in one audit, against one.

Run: ``python benchmarks/removal.py [--folder runs/demo] [--threads 2] [--compared 1] [--parts audit,ten,batched,one]``
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.adapters.base import Adapter
from expunge.audit import scores, statements
from expunge.audit.attacks import two_models
from expunge.audit.document import AuditDocument
from expunge.audit.evidence import Evidence, Subject, Values
from expunge.audit.judging import Attacked, attack_copy, attack_numbers
from expunge.audit.metrics.membership import Membership, PrivLeak
from expunge.audit.metrics.memorisation import ExtractionStrength, extraction_strength
from expunge.audit.metrics.registry import Metric
from expunge.audit.metrics.words import words
from expunge.audit.run import AuditedModel, audit, limited
from expunge.audit.settings import AuditSettings
from expunge.core.results import Number
from expunge.data.records import RecordSet
from expunge.pipeline import demo

PROTOCOL = "removal-v1"
BATCH = 32
#: Metrics that are made of others; in the careful baseline they share what these have computed.
MADE = ("probability", "option-probability", "rouge-l-recall", "truth-ratio", "model-utility", "forget-quality")
SECONDS_ALLOWED, RATIO_WANTED = 180.0, 5.0


class PrefixByPrefix(ExtractionStrength):
    """Extraction strength by one pass per prefix: does greedy decoding go on with the rest?"""

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """By brute force."""
        adapter, out = evidence.adapter(label), []
        for record in evidence.records(name):
            example = adapter.encode(record)
            size = len(adapter.spoken(example))
            shortest = size
            for given in range(size):
                (hits,) = next(scores.score(adapter, [adapter.resumed(example, given)]).examples("hit", end="exclude"))
                if hits.all():
                    shortest = min(shortest, given)
            out.append(extraction_strength(np.arange(size) >= shortest) if size else np.nan)
        return Values(np.array(out), np.isfinite(out))


@contextmanager
def as_they_come(rows: int) -> Iterator[None]:
    """While open, batches hold ``rows`` examples in the order of the data."""

    def batches(lengths: Sequence[int], _budget: int) -> Iterator[list[int]]:
        yield from ([*range(at, min(at + rows, len(lengths)))] for at in range(0, len(lengths), rows))

    held = [(module, module.by_length) for module in (scores, statements, two_models)]
    for module, _ in held:
        module.by_length = batches
    try:
        yield
    finally:
        for module, function in held:
            module.by_length = function


class OwnPasses:
    """Metric by metric, attack by attack, on models that are in memory."""

    def __init__(self, models: Sequence[AuditedModel], sets: Mapping[str, RecordSet], settings: AuditSettings, one: bool) -> None:
        self.models, self.sets, self.settings, self.one = models, sets, settings, one
        self.subjects = {m.label: Subject(m.label, m.role, m.adapter.fingerprint(), m.adapter) for m in models}
        self.offers = models[0].adapter.offers

    def fresh(self, unit: Sequence[Metric]) -> Evidence:
        """Evidence that nothing has been gathered for; answers are as long as this unit reads."""
        limits = [m.max_new_tokens for m in unit if "max_new_tokens" in type(m).model_fields]
        at = replace(
            self.settings.evidence_protocol(), batch_tokens=1 if self.one else BATCH * 64, max_new_tokens=max(limits, default=1)
        )
        return Evidence(dict(self.subjects), self.sets, at)

    def units(self) -> Iterator[list[Metric]]:
        """What is computed together."""
        metrics = self.settings.chosen(self.offers)
        if not self.one:
            yield [m for m in metrics if m.name in MADE]
        for m in metrics:
            if isinstance(m, (Membership, PrivLeak)):
                continue
            if isinstance(m, ExtractionStrength) and self.one:
                yield [PrefixByPrefix(**m.model_dump())]
            elif self.one or m.name not in MADE:
                yield [m]
        both = [m for m in metrics if isinstance(m, (Membership, PrivLeak))]
        for name in both[0].attacks if both else ():
            yield [m.model_copy(update={"attacks": (name,)}) for m in both]  # PrivLeak reads the scores behind the AUC
        yield from ([a] for a in self.settings.chosen_attacks(self.offers))

    def run(self) -> dict[str, dict[str, Number]]:
        """All numbers by model."""
        out: dict[str, dict[str, Number]] = {m.label: {} for m in self.models}
        labels = list(out)
        for unit in self.units():
            evidence, began = self.fresh(unit), processor()
            for label in labels:
                for m in unit:
                    out[label] |= m.compute(evidence, label)
                if self.one and any("min-k-plus-plus" in getattr(m, "attacks", ()) for m in unit):
                    for name in ("forget", "holdout"):  # the second pass, for mean and spread
                        scores.score(evidence.adapter(label), evidence.probes(label, name, "answer"), batch_tokens=1)
            print(f"  {', '.join(m.name for m in unit)}: {processor() - began:.1f} s", file=sys.stderr, flush=True)
        evidence, attacked = self.fresh([]), Attacked()
        for label in labels:
            attack_copy(evidence, label, self.settings, attacked)
        for label in labels:
            out[label] |= attack_numbers(evidence, attacked, label)
        return out


def compare(document: AuditDocument, theirs: Mapping[str, Mapping[str, Number]]) -> tuple[int, float]:
    """How many numbers were compared, and their largest difference; a missing or another number is an error."""
    worst, count = 0.0, 0
    for model in document.models:
        mine = model.numbers
        if set(mine) != set(theirs[model.label]):
            sys.exit(f"{model.label}: other numbers: {sorted(set(mine) ^ set(theirs[model.label]))}")
        for key, number in theirs[model.label].items():
            got, value = mine[key].value, number.value
            if (got is None) != (value is None) or (got is not None and not np.isclose(got, value, rtol=1e-3, atol=2e-3)):
                sys.exit(f"{model.label}, {key}: ours {got}, own passes {value}")
            count += 1
            worst = max(worst, abs(got - value) / max(1.0, abs(value)) if got is not None else 0.0)
    return count, worst


class Clock:
    """Wall and processor seconds, those of children included, and forward passes of models."""

    def __init__(self) -> None:
        self.times: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Time ``work`` under a name."""
        passes = 0

        def count(module: nn.Module, _inputs: Any) -> None:
            nonlocal passes
            passes += hasattr(module, "lm_head")

        hook = nn.modules.module.register_module_forward_pre_hook(count)
        wall, busy = time.perf_counter(), processor()
        try:
            found = work()
        finally:
            hook.remove()
        self.times[name] = {
            "wall": time.perf_counter() - wall, "processor": processor() - busy, "forward_passes": passes,
        }  # fmt: skip
        print(f"{name}: " + ", ".join(f"{k} {v:.1f}" for k, v in self.times[name].items()), file=sys.stderr, flush=True)
        return found

    def ratio(self, a: str, b: str) -> dict[str, float]:
        """How many times longer ``a`` took than ``b``."""
        return {k: self.times[a][k] / self.times[b][k] for k in ("wall", "processor")}


def processor() -> float:
    """Processor seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def mixtures(models: Sequence[AuditedModel], target: Adapter, count: int) -> list[AuditedModel]:
    """``count`` unlearned models: the given ones first, then means of their weights and the target's."""
    out = list(models)
    weights = target.model.state_dict()
    for i in range(count - len(out)):
        made = opened(models[i % len(models)]).adapter
        with torch.no_grad():
            for name, value in made.model.state_dict().items():
                value.copy_((value + weights[name]) / 2)
        out.append(AuditedModel(f"mixture {i + 1}", "unlearned", made))
    return out[:count]


def opened(model: AuditedModel) -> AuditedModel:
    """The model in memory."""
    return model if isinstance(model.adapter, Adapter) else replace(model, adapter=model.adapter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="of the demo; what is there is used again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compared", type=int, default=1, help="retrained models that both sides audit where they are compared")
    parser.add_argument("--budget", type=int, help="records per set at most where both sides are compared; none: all")
    parser.add_argument("--parts", default="audit,ten,batched,one", help="what is measured; all need minutes on an idle machine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    made = demo.prepare(options.folder, bars=lambda _: nullcontext(), say=lambda text: print(text, file=sys.stderr))
    torch.set_num_threads(options.threads)
    settings, sets = AuditSettings.under(PROTOCOL), made.sets
    part = {name: limited(records, settings.model_copy(update={"budget": options.budget})) for name, records in sets.items()}
    words("A word to load the stemmer, which all sides use.", True)
    gold = [m for m in made.models if m.role != "unlearned"]
    unlearned = [m for m in made.models if m.role == "unlearned"]
    one = next(m for m in unlearned if m.label == "npo")
    clock = Clock()

    def ours(models: Sequence[AuditedModel], cache: str, on: Mapping[str, RecordSet] = sets) -> AuditDocument:
        return audit(models, on, settings, cache=Path(cache))

    opened(one)  # what the first model of a process loads is no part of an audit
    result: dict[str, Any] = {
        "benchmark": "removal",
        "protocol": PROTOCOL,
        "records": {n: len(s) for n, s in sets.items()},
        "records_compared": {n: len(s) for n, s in part.items()},
        "threads": options.threads,
        "models": {"one": len(gold) + 1, "all": len(made.models), "ten": len(gold) + 10, "compared": 2 + options.compared},
        "seconds": clock.times,
        "targets": {"seconds": SECONDS_ALLOWED, "ratio": RATIO_WANTED},
    }
    parts = set(options.parts.split(","))
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b, tempfile.TemporaryDirectory() as c:
        if parts & {"audit", "ten"}:
            clock("one model, cold", lambda: ours([*gold, one], a))
        if "audit" in parts:
            clock("one model, again", lambda: ours([*gold, one], a))
            clock("all models of the demo, cold", lambda: ours(made.models, b))
            clock("all models of the demo, again", lambda: ours(made.models, b))
        if "ten" in parts:
            ten = mixtures(unlearned, opened(gold[0]).adapter, 10)
            clock("ten models, cold", lambda: ours([*gold, *ten], c))
            result["ten_against_one"] = clock.ratio("ten models, cold", "one model, cold")
    sides = [name for name in ("batched", "one") if name in parts]
    few = [opened(m) for m in (*gold[: 1 + options.compared], one)]
    with tempfile.TemporaryDirectory() as folder:
        mine = clock("compared models, ours", lambda: ours(few, folder, part)) if sides else None
    for name in sides:
        side = OwnPasses(few, part, settings, name == "one")
        with as_they_come(1 if name == "one" else BATCH):
            found = clock(f"compared models, own passes ({name})", side.run)
        count, worst = compare(mine, found)
        result[f"own_passes_{name}"] = {
            **clock.ratio(f"compared models, own passes ({name})", "compared models, ours"), "numbers": count,
            "largest_difference": worst,
        }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
