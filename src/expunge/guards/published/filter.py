"""Filter and refusal."""

from __future__ import annotations

from expunge.engine.parts import Paper
from expunge.guards.actions.refuse import Refuse
from expunge.guards.detectors.terms import Terms
from expunge.guards.named import guard
from expunge.guards.policy import Row

_PAPER = Paper("Guardrail Baselines for Unlearning in LLMs", "Thaker et al.", 2024, "https://arxiv.org/abs/2403.03329")


@guard(
    "filter",
    title="Filter and refusal",
    paper=_PAPER,
    caveats=("A target that is described and not named passes.", "A refusal tells that something is hidden."),
)
def filter_rows() -> list[Row]:
    """Refuses requests that name a target, and ends answers that do.

    The whole conversation is read, and the answer as far as it is known; the model is not called for a request that is refused.
    Costs nothing that grows with the number of targets.
    """
    return [Row(label="filter", detector=Terms(), action=Refuse())]
