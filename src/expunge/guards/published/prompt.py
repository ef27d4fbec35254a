"""Guardrail prompt."""

from __future__ import annotations

from expunge.engine.parts import Paper
from expunge.guards.actions.instruct import Instruct
from expunge.guards.detectors.always import Always
from expunge.guards.named import guard
from expunge.guards.policy import Row

_PAPER = Paper("Guardrail Baselines for Unlearning in LLMs", "Thaker et al.", 2024, "https://arxiv.org/abs/2403.03329")


@guard(
    "prompt",
    title="Guardrail prompt",
    paper=_PAPER,
    caveats=(
        "The list of what is hidden stands in every prompt, and can be asked for.",
        "Nothing keeps the model from ignoring it.",
    ),
)
def prompt_rows() -> list[Row]:
    """Tells the model, before each conversation, of what it is to know nothing."""
    return [Row(label="prompt", detector=Always(), action=Instruct())]
