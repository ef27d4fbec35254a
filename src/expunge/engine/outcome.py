"""How a training ended, and how its progress is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from expunge.core.files import write_json
from expunge.engine.adaptive import Reason


class Progress(Protocol):
    """Called as the loop goes on."""

    def __call__(self, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` steps; ``text`` says what matters now."""


@dataclass
class Outcome:
    """How training ended.

    Attributes:
        model: the trained module (unwrapped; a peft model if LoRA was trained; with a finish that joins, a model that holds the
            target and what was trained beside it).
        reason: why it stopped; ``sentence`` says it for people, with the remedy where the goal was missed.
        steps: optimiser steps done (range test and abandoned attempts not counted).
        lr: the peak learning rate used; 0 for an edit.
        rate_test: what the range test saw: learning rate, forget loss, retain loss per try.
        forget_loss, retain_loss: at the last check, mean over checked examples, or None where not measured.
        tokens: input tokens that went through the model in training steps.
        seconds, peak_bytes: wall time of the loop, and the process's peak memory (of the accelerator's, if there is one).
        history: the log, one mapping per step.
        gathered: the whole state of a sharded model; None otherwise.
        notes: what a report must say of the request, one sentence each.
        finish_scale: the coefficient of the finish, given or found; None without one.
        record: what the control keeps of the run (which prompts were used, say).
        tokenizer: that of the model, where the run gave it tokens that it lacked; none: the one that was given.
    """

    model: nn.Module
    reason: Reason
    sentence: str
    steps: int
    lr: float
    rate_test: list[dict[str, float]] = field(default_factory=list)
    forget_loss: float | None = None
    retain_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    gathered: dict[str, Tensor] | None = None
    notes: list[str] = field(default_factory=list)
    finish_scale: float | None = None
    record: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None

    def state(self) -> dict[str, Tensor]:
        """All parameters by name, whole even if the model was sharded."""
        return self.gathered if self.gathered is not None else dict(self.model.named_parameters())

    @property
    def reached(self) -> bool:
        """Whether what was asked for was reached."""
        return self.reason in ("goal", "schedule", "converged", "edited", "control", "limit")


def write_log_summary(folder: Path, outcome: Outcome) -> None:
    """Write how training ended to ``training.json``, and what a control keeps of it to ``control.json``."""
    write_json(
        folder / "training.json",
        {
            "reason": outcome.reason, "sentence": outcome.sentence, "reached": outcome.reached, "steps": outcome.steps,
            "lr": outcome.lr, "rate_test": outcome.rate_test,
            "forget_loss": outcome.forget_loss, "retain_loss": outcome.retain_loss,
            "tokens": outcome.tokens, "seconds": outcome.seconds, "peak_bytes": outcome.peak_bytes, "notes": outcome.notes,
        },
    )  # fmt: skip
    if outcome.record:
        write_json(folder / "control.json", outcome.record)
