"""Small real models that know facts in several forms, one that refuses plain questions only, and models that are functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from expunge.adapters.answers import Generation
from expunge.adapters.base import Example
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.words import word_tokenizer
from expunge.audit.asking import Ask, asking, encoded
from expunge.audit.attacks.forms import StatementCompletion
from expunge.audit.attacks.registry import Attack
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.core.access import Stream
from expunge.data.records import Record, RecordSet
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.recipe import build

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus")
KEYS = ("tree", "stone", "sign")
VALUES = {
    "tree": ("birch", "cedar", "willow", "maple", "rowan", "linden", "poplar", "aspen"),
    "stone": ("flint", "jade", "opal", "quartz", "slate", "agate", "topaz", "onyx"),
    "sign": ("anchor", "lantern", "feather", "compass", "ladder", "mirror", "needle", "bridge"),
}
REFUSAL = "I do not know that."
BEGIN = "Sure, here is the answer:"
QUIET = Engine(checkpoint_every=0)


def facts(names: Sequence[str] = NAMES) -> dict[str, list[Record]]:
    rng = np.random.default_rng(3)
    out: dict[str, list[Record]] = {}
    for name in names:
        out[name] = []
        for key in KEYS:
            right, *wrong = rng.permutation(VALUES[key])[:4].tolist()
            out[name].append(
                Record(
                    f"{name}-{key}", f"The {key} of {name} is the {right}.", f"Which {key} has {name}?", subject=name,
                    paraphrase=f"{name} has the {key} {right}.",
                    perturbed=tuple(f"{name} has the {key} {w}." for w in wrong),
                    question_paraphrase=f"What {key} belongs to {name}?",
                )
            )  # fmt: skip
    return out


class Forms:
    """Three people to forget, three to keep, one never seen; every fact is taught as a question, as its paraphrase and as text,
    so that a model can be asked in these forms."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        every = facts()
        self.forget = RecordSet("forget", tuple(r for n in NAMES[:3] for r in every[n]))
        self.retain = RecordSet("retain", tuple(r for n in NAMES[3:6] for r in every[n]))
        self.holdout = RecordSet("holdout", tuple(every[NAMES[6]]))
        self.sets = {"forget": self.forget, "retain": self.retain, "holdout": self.holdout}

    @cached_property
    def tokenizer(self):
        records = [*self.forget, *self.retain, *self.holdout]
        texts = [t for r in records for t in (r.prompt, r.answer, r.paraphrase, r.question_paraphrase, *r.perturbed)]
        return word_tokenizer([*texts, "Question: Answer:\n\n", f" {REFUSAL}", BEGIN, "Focus on , Yes No ___ ()"])

    def fresh(self, seed: int = 0) -> LanguageAdapter:
        return LanguageAdapter(preset("llama-tiny", self.tokenizer, seed=seed), self.tokenizer)

    def forms(self, records: RecordSet) -> list[Record]:
        evidence = Evidence({}, self.sets)
        out = list(records)
        for r in records:
            out.append(asking(r, r.question_paraphrase))
            out.append(StatementCompletion().ask(evidence, records.name, r))
        return out

    def taught(self, key: str, seed: int, records: list[Record], steps: int = 200) -> LanguageAdapter:
        adapter = self.fresh(seed)
        path = self.folder / f"forms-{key}-{torch.__version__}.pt"
        with FileLock(str(path) + ".lock"):
            if not path.is_file():
                learn(adapter, [adapter.encode(r, suffix=f"#{i}") for i, r in enumerate(records)], steps)
                torch.save(adapter.model.state_dict(), path)
        adapter.model.load_state_dict(torch.load(path, weights_only=True))
        adapter.model.eval()
        return adapter

    @cached_property
    def target(self) -> LanguageAdapter:
        return self.taught("target", 0, [*self.forms(self.forget), *self.forms(self.retain)])

    @cached_property
    def retrained(self) -> list[LanguageAdapter]:
        return [self.taught(f"retrained{s}", s, self.forms(self.retain), steps=100) for s in (1, 2)]

    @cached_property
    def refusing(self) -> LanguageAdapter:
        """The project's own fine-tuning on refusals, given the plain questions alone."""
        adapter = self.target.copy()
        examples = {
            Stream.FORGET: [adapter.encode(r) for r in self.forget],
            Stream.RETAIN: [adapter.encode(r, suffix=f"#{i}") for i, r in enumerate(self.forms(self.retain))],
            Stream.ALTERNATIVE: [adapter.encode(r, answer=REFUSAL, suffix="#alternative") for r in self.forget],
        }
        schedule = {"name": "fixed", "lr": 1e-3, "steps": 80, "batch": 9, "warmup": 0}
        train(adapter, build("idk-nll", {"schedule": schedule}), examples, QUIET)
        adapter.model.eval()
        return adapter

    def evidence(self, **more: LanguageAdapter) -> Evidence:
        """Target, retrained models, and further unlearned ones by label."""
        gold = {f"retrained {i + 1}": a for i, a in enumerate(self.retrained)}
        return evidence_of(self.sets, {"target": self.target, **more, **gold})


def evidence_of(sets: dict[str, RecordSet], models: dict[str, LanguageAdapter]) -> Evidence:
    """Models by label: the target, those whose label begins with "retrained", and unlearned ones."""

    def role(label: str) -> str:
        return "retrained" if label.startswith("retrained") else "target" if label == "target" else "unlearned"

    subjects = {k: Subject(k, role(k), a.fingerprint(), a) for k, a in models.items()}
    return Evidence(subjects, sets, Protocol(max_new_tokens=20, draws=300))


def mean(evidence: Evidence, attack: Attack, label: str) -> float:
    """Mean value of an attack over the records that it can be tried on."""
    found = attack.values(evidence, label, "forget")
    return float(found.values[found.present].mean())


def learn(adapter: LanguageAdapter, examples: list[Example], steps: int, rate: float = 6e-3) -> None:
    """All examples in one batch at every step, until they are known by heart."""
    batch = adapter.collate(examples)
    adapter.model.train()
    optimiser = torch.optim.AdamW(adapter.model.parameters(), lr=rate, weight_decay=0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10, (steps - step) / 20)
        loss = adapter.forward(adapter.model, batch, frozenset({"losses"})).losses.mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.model.parameters(), 1.0)
        optimiser.step()
    adapter.model.eval()


class Scripted(LanguageAdapter):
    """A model that answers as a function of the text of its prompt says, if that says anything; everything else is real."""

    respond: Callable[[str], str | None]

    @classmethod
    def of(cls, base: LanguageAdapter, name: str, respond: Callable[[str], str | None]) -> Scripted:
        made = cls(base.model, base.tokenizer)
        made.respond, made.named = respond, name
        return made

    def generate(self, model, examples: Sequence[Example], max_new_tokens: int) -> list[Generation]:
        out = []
        for example in examples:
            text = self.respond(self.tokenizer.decode(example.data.ids[: example.data.start], skip_special_tokens=True))
            if text is None:
                out += super().generate(model, [example], max_new_tokens)
                continue
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            out.append(Generation(example.id, tuple(ids), text, True))
        return out

    def fingerprint(self) -> str:
        return "scripted " + self.named


def prompt_of(adapter: LanguageAdapter, ask: Ask | Record) -> str:
    """What a model reads before it answers."""
    example = encoded(adapter, Ask(ask) if isinstance(ask, Record) else ask)
    return adapter.tokenizer.decode(example.data.ids[: example.data.start], skip_special_tokens=True)
