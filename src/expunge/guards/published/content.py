"""Content filter."""

from __future__ import annotations

from expunge.engine.parts import Paper
from expunge.guards.actions.refuse import Refuse
from expunge.guards.detectors.content import Content
from expunge.guards.named import guard
from expunge.guards.policy import Row

_PAPER = Paper(
    "UnUnlearning: Unlearning is not sufficient for content regulation in advanced generative AI",
    "Ilia Shumailov et al.",
    2024,
    "https://arxiv.org/abs/2407.00106",
)


@guard(
    "content",
    title="Content filter",
    paper=_PAPER,
    caveats=(
        "Facts are matched by their words: synonyms, and dates written otherwise, pass.",
        "What follows from facts that may be told is not noticed.",
        "A refusal tells that something is hidden.",
    ),
)
def content_rows() -> list[Row]:
    """Refuses requests that bring facts of a target along, and ends answers that state one.

    It says nothing of where the knowledge comes from: that a target's facts cannot be produced is another claim than that they
    are not in the weights. The paper asks for such a filter and gives none; its rules are ours. A question about a target
    passes; what matters is what is said.
    """
    return [Row(label="content", detector=Content(), action=Refuse())]
