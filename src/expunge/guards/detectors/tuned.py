"""Sequence classifiers of transformers: loaded, or fine-tuned as ECO (arXiv 2406.07933) has it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn import functional

from expunge.core.errors import InputError
from expunge.core.settings import Settings


class Tuning(Settings):
    """The published schedule of the prompt classifier."""

    name: ClassVar[str] = "tuning"

    epochs: int = Field(30, ge=1, description="passes over all prompts")
    batch: int = Field(16, ge=1, description="prompts a step")
    lr: float = Field(2e-5, gt=0, description="highest learning rate; it falls along a cosine")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which it rises")
    weight_decay: float = Field(0.1, ge=0, description="of Adam, decoupled")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the model, while it is tuned")
    max_length: int = Field(512, ge=8, description="tokens of a prompt; of a longer one, the last are left out")
    check: float = Field(
        0.99, gt=0, lt=1, description="probability from which on a target's question counts as noticed in checks"
    )


class Sequences:
    """A classifier of two labels that is ready to be asked.

    Args:
        tokenizer: of the model.
        model: with two labels; the last is 'a target'.
        max_length: tokens of a prompt.
    """

    def __init__(self, tokenizer: Any, model: Any, max_length: int = 512) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.limit = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
        if getattr(model.config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
            self.limit = min(self.limit, model.config.max_position_embeddings - 2)  # their positions begin after the pad's

    def logits(self, texts: Sequence[str]) -> Any:
        """Scores, ``[n, labels]``."""
        given = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
        return self.model(**given.to(self.model.device)).logits

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Probability of the last label, ``[n]``."""
        found = [self.logits(texts[at : at + 64]).double().softmax(-1)[:, -1].cpu().numpy() for at in range(0, len(texts), 64)]
        return np.concatenate(found) if found else np.empty(0)


def loaded(name: str, device: str, max_length: int = 512) -> Sequences:
    """A classifier from a folder or by name.

    Raises:
        InputError: there is none.
    """
    tokenizer, model = _load(name)
    return Sequences(tokenizer, model.to(device).eval(), max_length)


def _load(name: str, dropout: float | None = None) -> tuple[Any, Any]:
    from expunge.adapters.loading import load_auto, load_config

    try:
        config = load_config(name)
        if dropout is not None:  # to be tuned, to two labels
            config.num_labels = 2
            for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
                if hasattr(config, field):
                    setattr(config, field, dropout)
        model, tokenizer = load_auto("AutoModelForSequenceClassification", name, config=config)
    except InputError as error:
        raise InputError(f"There is no classifier {name!r}: {error.message}", error.remedy) from None
    return tokenizer, model


def tuned(
    name: str, asked: Sequence[str], ordinary: Sequence[str], how: Tuning, *, seed: int = 0, device: str = "cpu",
    report: Callable[[int, int], None] | None = None,
) -> Sequences:  # fmt: skip
    """Fine-tune a model to tell questions of targets from ordinary prompts.

    Cross-entropy with a weight of ``N / n_c`` for the ``n_c`` of ``N`` prompts of class ``c``; Adam with betas 0.9 and 0.98 and
    epsilon 1e-6, no clipping. Kept is the pass after which the fewest questions of targets are below ``check``, the last of
    equals. (The published script cannot be run as it is: it reads an argument that it does not define.)

    Args:
        name: folder or name of the model.
        asked: questions of targets.
        ordinary: ordinary prompts.
        how: the schedule.
        seed: of order, dropout and the new head.
        device: where it runs.
        report: told after each pass: the pass, and how many questions were not noticed.

    Raises:
        InputError: there is no such model.
    """
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        tokenizer, model = _load(name, how.dropout)
        made = Sequences(tokenizer, model.to(device), how.max_length)
        texts = [*asked, *ordinary]
        labels = torch.tensor([1] * len(asked) + [0] * len(ordinary), device=device)
        weights = len(texts) / labels.bincount(minlength=2).clamp(min=1).float()
        optimiser = torch.optim.AdamW(model.parameters(), lr=how.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=how.weight_decay)
        total = how.epochs * math.ceil(len(texts) / how.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _factor(step, total, how.warmup))
        best: tuple[int, dict[str, Any]] | None = None
        for epoch in range(how.epochs):
            model.train()
            order = torch.randperm(len(texts))
            for rows in (order[at : at + how.batch] for at in range(0, len(texts), how.batch)):
                loss = functional.cross_entropy(made.logits([texts[i] for i in rows]), labels[rows.to(device)], weights)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
            missed = int((settled(made)(asked) < how.check).sum())
            if best is None or missed <= best[0]:
                best = (missed, copy.deepcopy(model.state_dict()))
            if report is not None:
                report(epoch, missed)
        model.load_state_dict(best[1] if best else model.state_dict())
    return settled(made)


def settled(made: Sequences) -> Sequences:
    """The same, without dropout."""
    made.model.eval()
    return made


def _factor(step: int, total: int, warmup: float) -> float:
    rising = warmup * total
    if step < rising:
        return (step + 1) / max(1.0, rising)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, total - rising))))
