"""Agentic unlearning."""

from __future__ import annotations

from expunge.engine.parts import Paper
from expunge.guards.actions.alu import ALU
from expunge.guards.detectors.always import Always
from expunge.guards.named import guard
from expunge.guards.policy import Row

_PAPER = Paper(
    "Agents Are All You Need for LLM Unlearning", "Debdeep Sanyal, Murari Mandal", 2025, "https://arxiv.org/abs/2502.00406"
)


@guard(
    "alu",
    title="Agents that audit an answer (ALU)",
    paper=_PAPER,
    caveats=(
        "Up to five calls of a chat model for an answer, one where nothing is revealed; nothing is streamed.",
        "The names stand in the agents' prompts, and the first answer in their server's memory.",
        "Questions that each reveal nothing can be chained.",
    ),
)
def alu_rows() -> list[Row]:
    """Has every answer audited by agents, and rewritten or refused where it reveals a target."""
    return [Row(label="alu", detector=Always(), action=ALU())]
