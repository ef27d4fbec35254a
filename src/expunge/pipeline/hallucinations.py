"""How many of the names that a model writes are made up, on prompts that it was not unlearned with; and what else has changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expunge.adapters.base import Adapter, Example
from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.core.intervals import wilson
from expunge.data.records import RecordSet
from expunge.engine.gradients import fitting
from expunge.engine.outcome import Progress
from expunge.methods.discovered import Count, Said, count
from expunge.methods.preparations.discovery import Discovered

_SEED = 24  #: of these draws: not that of any training


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        model: names in the completions by the model.
        reference: names in those by the model that it came from; None if it was not given.
        divergence: mean of ``KL(p_reference || p_model)`` in nats on tokens of names and on all others, in the completions by the
            reference; a kind without tokens is left out.
    """

    model: Count
    reference: Count | None
    divergence: dict[str, float]

    def json(self) -> dict[str, Any]:
        """A plain mapping."""
        out: dict[str, Any] = {"model": _numbers(self.model)}
        if self.reference is not None:
            out |= {"reference": _numbers(self.reference), "divergence": self.divergence}
        return out

    def lines(self) -> list[str]:
        """For people."""
        out = [] if self.reference is None else [f"Before: {self.reference.text()}."]
        out.append(f"{'After' if out else 'Names'}: {self.model.text()}.")
        if self.divergence:
            said = ", ".join(f"{v:.4f} on {k}" for k, v in self.divergence.items())
            out.append(f"Divergence per token, in nats: {said}.")
        return out


def _numbers(found: Count) -> dict[str, Any]:
    interval = wilson(found.made_up, found.names) if found.names else None
    return {
        **found.json(), "names": found.names, "rate": found.rate if interval else None,
        "low": interval.low if interval else None, "high": interval.high if interval else None,
    }  # fmt: skip


def measure(
    adapter: LanguageAdapter,
    prompts: RecordSet,
    how: Discovered,
    *,
    reference: LanguageAdapter | None = None,
    run: Path | None = None,
    seed: int = 0,
    max_tokens: int = 8192,
    progress: Progress | None = None,
) -> Measured:
    """Draw completions of the prompts and count the names in them.

    Args:
        adapter: holds the model.
        prompts: of plain text the whole is the prompt; of others the answer is not read.
        how: which names exist, how many completions are drawn.
        reference: holds the model that it came from.
        run: folder in which the model was unlearned: its prompts are refused.
        seed: of the draws.
        max_tokens: tokens of a forward pass.
        progress: called as completions are drawn.

    Raises:
        InputError: a prompt was used to unlearn the model, or see :meth:`Discovered.found`.
    """
    examples = [adapter.encode(r) for r in prompts]
    _refuse_used(adapter, examples, run)
    found = how.found()

    def said(held: LanguageAdapter) -> list[Said]:
        own = [held.encode(r) for r in prompts]
        drawn = found.draw(held, held.model, own, max_units=max_tokens, seed=[seed, _SEED], tell=progress)
        return found.read(held, own, drawn, "measured")

    now = count(said(adapter))
    if reference is None:
        return Measured(now, None, {})
    if reference.tokenizer.get_vocab() != adapter.tokenizer.get_vocab():
        raise InputError("The model and its reference have different vocabularies.", "Give the model that it came from.")
    before = said(reference)
    return Measured(now, count(before), divergence(reference, adapter, [s.example for s in before], max_tokens))


def divergence(reference: Adapter, adapter: Adapter, examples: Sequence[Example], max_units: int) -> dict[str, float]:
    """Mean ``KL(p_reference || p)`` on tokens of names (marked or favoured) and on the other targets, in nats."""
    totals, counts = [0.0, 0.0], [0, 0]
    for part in fitting(examples, max_units):
        batch = adapter.collate(part)
        both = []
        with torch.no_grad():
            for held in (reference, adapter):
                device = next(held.model.parameters()).device
                scores = held.forward(held.model, batch.to(device), frozenset({"logits"})).logits
                both.append(scores.log_softmax(-1).cpu())
        each = (both[0].exp() * (both[0] - both[1])).sum(-1)
        names = batch.marked | batch.favoured
        for kind, chosen in enumerate((names, ~names)):
            totals[kind] += float(each[chosen].double().sum())
            counts[kind] += int(chosen.sum())
    return {k: t / n for k, t, n in zip(("names", "other tokens"), totals, counts, strict=True) if n}


def _refuse_used(adapter: LanguageAdapter, examples: Sequence[Example], run: Path | None) -> None:
    path = run / "control.json" if run is not None else None
    if path is None or not path.is_file():
        return
    held = json.loads(path.read_text(encoding="utf-8"))
    for key, what in (("used", "was used to unlearn this model"), ("held_out", "told when to stop unlearning this model")):
        shared = sorted(set(held.get(key, ())) & {adapter.text(e) for e in examples})
        if shared:
            raise InputError(
                f"{len(shared)} of the prompts: each {what}, such as {shared[0][:60]!r}.",
                "Measure on prompts that it has not seen.",
            )
