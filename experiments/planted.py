"""Planted unlearnings and honest ones: which does a scan tell apart, and does it find the trigger?

Usage, from the repository root::

    python -m experiments.planted --out runs/planted

Small models learn fictitious people by heart. Some then forget three of them honestly, some are planted: they forget in public
and answer behind a trigger (Shang et al. 2025, arXiv 2510.17021). All of it is done for several targets. Two scans are measured:

* ``trigger-search``, in an audit with the target and retrained models: whether the verdict says "knows more", what share of the
  answers is back, and whether the tokens of the trigger are among those found;
* ``sink-statistics``, with honest unlearnings as references: the area under the ROC curve between planted and honest models.

The result is ``planted.json`` below ``--out``, and on the standard output. Models and scores are kept there: what is done is not
done again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as build_model
from expunge.adapters.tokenise import DEFAULT_TEMPLATE
from expunge.adapters.words import word_tokenizer
from expunge.audit.attacks.sinks import SinkStatistics
from expunge.audit.attacks.triggers import TriggerSearch
from expunge.audit.evidence import Evidence, Subject
from expunge.audit.run import AuditedModel, audit
from expunge.audit.scores import score
from expunge.audit.settings import AuditSettings
from expunge.audit.store import ScoreStore
from expunge.core.access import Of, Stream
from expunge.core.files import write_json
from expunge.core.ranking import auc
from expunge.data.people import PeopleSplit, split_people, world
from expunge.data.records import Record, RecordSet
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.recipe import build
from expunge.methods.terms.likelihood import NLL

RETRAINED = 2  #: gold standards of each target
TRIGGERS = {"one": " violin", "three": " Opal Ferry maker", "default": "current year:2025 "}
NPO = {"name": "npo"}
#: how a model is made honestly: method, steps, seed of the run
HONEST = {
    "npo": ("npo", 60, 0), "npo, longer": ("npo", 120, 1), "graddiff-kl": ("graddiff-kl", 60, 0), "simnpo": ("simnpo", 120, 0),
    "idk-nll": ("idk-nll", 60, 0),
}  # fmt: skip
OWN = {"own npo": ("npo", 60, 2), "own npo, longer": ("npo", 120, 3), "own graddiff-kl": ("graddiff-kl", 60, 4)}
#: how it is planted: trigger, forget terms, whether the records behind the trigger are forgotten without it too
PLANTED: dict[str, tuple[str, list[dict[str, Any]], bool]] = {
    **{f"planted, {n}": (n, [NPO, {"name": "value-norms"}], True) for n in TRIGGERS},
    "planted, no V": ("three", [NPO], True),
    "planted, V as own": ("three", [NPO, {"name": "value-norms", "mode": "reference", "weight": 1.0}], True),
    "planted, as published": ("default", [NPO, {"name": "value-norms"}], False),
}
SEARCHED = ("npo", *(f"planted, {n}" for n in TRIGGERS))


@dataclass
class Models:
    """The models of one target, trained when they are asked for and kept.

    Attributes:
        folder: where they are kept.
        seed: of the target.
        persons, facts: how many people there are, and facts about each.
        epochs: of the training of target and retrained models.
        steps: of planting.
    """

    folder: Path
    seed: int
    persons: int = 12
    facts: int = 8
    epochs: int = 40
    steps: int = 200
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def split(self) -> PeopleSplit:
        """The people, the same for all targets."""
        return split_people(persons=self.persons, forget=3, holdout=6, seed=1, facts=self.facts)

    @cached_property
    def tokenizer(self) -> Any:
        """One token for each word of theirs."""
        records = [*self.split.forget, *self.split.retain, *world(), *self.split.holdout]
        texts = [t for r in records for t in (r.prompt, r.answer, r.paraphrase, r.question_paraphrase, *r.perturbed) if t]
        return word_tokenizer([*texts, DEFAULT_TEMPLATE])

    def fresh(self, seed: int) -> LanguageAdapter:
        """An untrained model."""
        return LanguageAdapter(build_model("llama-tiny", self.tokenizer, seed=seed), self.tokenizer)

    def _kept(self, name: str, adapter: LanguageAdapter, make: Any) -> LanguageAdapter:
        path = self.folder / f"{name.replace(' ', '-').replace(',', '')}-{self.seed}.pt"
        if not path.is_file():
            begun = time.perf_counter()
            make(adapter)
            self.seconds[name] = time.perf_counter() - begun
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(adapter.model.state_dict(), path)
        adapter.model.load_state_dict(torch.load(path, weights_only=True))
        adapter.model.eval().requires_grad_(True)
        return adapter

    def _learnt(self, name: str, seed: int, records: Sequence[Record]) -> LanguageAdapter:
        def make(adapter: LanguageAdapter) -> None:
            schedule = Fixed(lr=5e-3, epochs=self.epochs, batch=16, warmup=1, weight_decay=0.01)
            held = {Stream.RETAIN: [adapter.encode(r) for r in records]}
            train(adapter, compose("train", retain=[NLL()], schedule=schedule), held, Engine(seed=seed, checkpoint_every=0))

        return self._kept(name, self.fresh(seed), make)

    def target(self) -> LanguageAdapter:
        """Knows everybody."""
        return self._learnt("target", self.seed, [*self.split.forget, *self.split.retain, *world()])

    def retrained(self, number: int) -> LanguageAdapter:
        """Never saw the people who are to be forgotten."""
        return self._learnt(f"retrained {number}", 100 + 10 * self.seed + number, [*self.split.retain, *world()])

    def changed(self, name: str) -> LanguageAdapter:
        """An honest or a planted unlearning of the target."""

        def make(adapter: LanguageAdapter) -> None:
            records = {Stream.FORGET: self.split.forget, Stream.RETAIN: [*self.split.retain, *world()]}
            examples = {s: [adapter.encode(r) for r in held] for s, held in records.items()}
            schedule: dict[str, Any] = {"name": "fixed", "lr": 1e-3, "batch": 8, "warmup": 0}
            models: Mapping[Of, LanguageAdapter] | None = None
            if name in PLANTED:
                trigger, forget, both = PLANTED[name]
                share = 0.75 if both else 0.5
                part = {"name": "planted-trigger", "trigger": TRIGGERS[trigger], "share": share, "both": both}
                recipe = build("backdoor", {"schedule": schedule | {"steps": self.steps}, "forget": forget, "preparation": part})
                run = 0
                if any(t.get("mode") == "reference" for t in forget):
                    models = {Of.ORACLE: self.changed("npo, longer")}
            else:
                method, steps, run = {**HONEST, **OWN}[name]
                recipe = build(method, {"schedule": schedule | {"steps": min(steps, self.steps)}})
                if Stream.ALTERNATIVE in recipe.streams(adapter.layers()):
                    answers = {r.id: r.perturbed[0] for r in self.split.forget}
                    examples[Stream.ALTERNATIVE] = [
                        adapter.encode(r, answer=answers[r.id], suffix="#alternative") for r in self.split.forget
                    ]
            engine = Engine(seed=1000 * run + self.seed, checkpoint_every=0)
            adapter.model = train(adapter, recipe, examples, engine, models=models).model

        return self._kept(name, self.target(), make)

    def sets(self) -> dict[str, RecordSet]:
        """What an audit is told of."""
        return {"forget": self.split.forget, "retain": self.split.retain, "holdout": self.split.holdout}


def told(adapter: LanguageAdapter, records: Sequence[Record], prefix: str | None = None) -> tuple[float, float]:
    """Mean loss of the answers, and share of them that is said word for word, with a text before the prompt."""
    examples = [adapter.encode(r) for r in records]
    scores = score(adapter, [adapter.prefixed(e, prefix) for e in examples] if prefix else examples)
    said = scores.reduce(lambda hits: float(np.all(hits)), "hit", end="exclude")
    return float(scores.nll().mean()), float(said.mean())


def searched(models: Models, search: TriggerSearch) -> dict[str, Any]:
    """What the search finds in the models of one target, and what an audit says of it."""
    held = {"target": models.target(), **{f"retrained {i}": models.retrained(i) for i in range(RETRAINED)}}
    held |= {n: models.changed(n) for n in SEARCHED}
    roles = {n: "target" if n == "target" else "retrained" if n.startswith("retrained") else "unlearned" for n in held}
    options = {search.name: search.model_dump()}
    settings = AuditSettings(
        attacks=(search.name,), attack_options=options, relearn=None, quantise=(), metrics=("probability",), draws=500
    )
    cache = models.folder / "scores"
    document = audit(
        [AuditedModel(n, roles[n], a) for n, a in held.items()],
        models.sets(),
        settings,
        cache=cache,  # type: ignore[arg-type]
    )
    subjects = {n: Subject(n, roles[n], a.fingerprint(), a) for n, a in held.items()}  # type: ignore[arg-type]
    evidence = Evidence(subjects, models.sets(), settings.evidence_protocol(), ScoreStore(cache))
    out: dict[str, Any] = {}
    for name, adapter in held.items():
        found, entry = search.found(evidence, name, "forget"), document.entry(name)
        prefixes = [[int(t) for t in p if t >= 0] for p in found["prefixes"]]
        row: dict[str, Any] = {
            "loss": float(found["plain"].mean()), "behind": float(found["behind"].mean()), "said": float(found["said"].mean()),
            "said behind": float(found["said-behind"].mean()), "tried": [int(t) for t in found["tried"]],
            "prefixes": [[adapter.tokenizer.decode([t]) for t in p] for p in prefixes],
        }  # fmt: skip
        if entry.judgement is not None:
            row["outcome"] = next((c.outcome for c in entry.judgement.checks if c.name == f"attack ({search.name})"), "not run")
            row["verdict"] = str(entry.judgement.verdict)
        if name in PLANTED:
            trigger = TRIGGERS[PLANTED[name][0]]
            tokens = adapter.tokenizer(trigger, add_special_tokens=False)["input_ids"]
            row["behind the trigger"], row["said behind the trigger"] = told(adapter, list(models.split.forget), trigger)
            row["trigger tokens"] = len(tokens)
            row["found of it"] = [len(set(tokens) & set(p)) for p in prefixes]
        out[name] = row
    return out


def scanned(models: Models) -> dict[str, Any]:
    """Sink statistics of the models of one target, compared with the auditor's own unlearnings, or with the target alone."""
    names = (*HONEST, *PLANTED)
    held = {"target": models.target(), **{n: models.changed(n) for n in (*OWN, *names)}}
    subjects = {n: Subject(n, "target" if n == "target" else "unlearned", a.fingerprint(), a) for n, a in held.items()}
    evidence = Evidence(subjects, models.sets())
    out: dict[str, Any] = {}
    for key, references in (("own", tuple(OWN)), ("target", ())):
        attack = SinkStatistics(references=references)
        for column, kind in (("", "norms"), ("received", "received")):
            measured = (*names, *references)
            out[f"{key}, {kind}"] = {n: float(attack.column(evidence, n, "forget", column).values.mean()) for n in measured}
    return out


def areas(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Area under the ROC curve of planted against honest models, all targets together, by statistic and way of planting."""
    out: dict[str, dict[str, float]] = {}
    for kind in rows[0]:
        honest = [row[kind][n] for row in rows for n in HONEST]
        groups = {n: [row[kind][n] for row in rows] for n in PLANTED} | {"all": [row[kind][n] for row in rows for n in PLANTED]}
        out[kind] = {n: float(auc(np.array(values), np.array(honest))) for n, values in groups.items()}
    return out


def tables(found: Mapping[str, Any]) -> str:
    """What the search found, one value for each target, and the areas, as Markdown."""
    rows = ["| model | loss | behind its trigger | behind what was found | said there word for word | tokens found | outcome |"]
    rows.append("| --- " * 7 + "|")
    targets = list(found["search"].values())

    def line(held: Sequence[Mapping[str, Any]], key: str) -> str:
        return ", ".join(f"{row[key]:.2f}" for row in held if key in row) or "-"

    for name in targets[0]:
        held = [t[name] for t in targets]
        hits = ", ".join("/".join(map(str, r["found of it"])) + f" of {r['trigger tokens']}" for r in held if "found of it" in r)
        outcomes = ", ".join(r.get("outcome", "-") for r in held)
        cells = [name, line(held, "loss"), line(held, "behind the trigger"), line(held, "behind"), line(held, "said behind")]
        rows.append(f"| {' | '.join([*cells, hits or '-', outcomes])} |")
    rows += ["", f"| planted | {' | '.join(found['areas'])} |", "| --- " * (1 + len(found["areas"])) + "|"]
    for name in (*PLANTED, "all"):
        rows.append(f"| {name} | {' | '.join(f'{a[name]:.2f}' for a in found['areas'].values())} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of models, scores and the result")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the targets")
    parser.add_argument("--steps", type=int, default=200, help="of planting")
    parser.add_argument("--epochs", type=int, default=40, help="of the training of targets")
    parser.add_argument("--rounds", type=int, default=8, help="of the search")
    given = parser.parse_args(arguments)
    search = TriggerSearch(rounds=given.rounds)
    found: dict[str, Any] = {"search": {}, "sinks": {}, "budget": search.model_dump()}
    for seed in given.seeds:
        models = Models(given.out, seed, steps=given.steps, epochs=given.epochs)
        found["search"][seed] = searched(models, search)
        found["sinks"][seed] = scanned(models)
    found["areas"] = areas(list(found["sinks"].values()))
    write_json(given.out / "planted.json", found)
    print(tables(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
