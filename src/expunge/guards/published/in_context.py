"""Two guards that work by what stands in the prompt."""

from __future__ import annotations

from expunge.engine.parts import Paper
from expunge.guards.actions.flip import Flip
from expunge.guards.actions.tag import Tag
from expunge.guards.detectors.terms import Terms
from expunge.guards.named import guard
from expunge.guards.policy import Row

_TAG = Paper(
    "Answer When Needed, Forget When Not: Language Models Pretend to Forget via In-Context Knowledge Unlearning",
    "Shota Takashiro et al.",
    2024,
    "https://arxiv.org/abs/2410.00382",
)
_ICUL = Paper(
    "In-Context Unlearning: Language Models as Few Shot Unlearners",
    "Martin Pawelczyk, Seth Neel, Himabindu Lakkaraju",
    2023,
    "https://arxiv.org/abs/2310.07579",
)


@guard(
    "in-context",
    title="In-context knowledge unlearning",
    paper=_TAG,
    caveats=(
        "The model must have been taught the tag: by the method in-context-teaching.",
        "What is asked without a name gets no tag, and is answered in full.",
    ),
)
def in_context() -> list[Row]:
    """Puts a tag before questions that name a target; the model, taught to obey it, says that it forgot.

    In the paper the caller says what is to be forgotten; here a target's names do, and the tag names the target.
    """
    return [Row(label="in-context", detector=Terms(), action=Tag())]


@guard(
    "icul",
    title="In-context unlearning (ICUL)",
    paper=_ICUL,
    caveats=(
        "Answers become wrong rather than refused.",
        "The target's questions stand in the prompt, and can be asked for.",
        "A model that does not learn from its prompt is not moved.",
    ),
)
def icul() -> list[Row]:
    """Puts wrong examples of a target, and right ones of others, before questions that name it.

    The paper has no detector: the examples stand before every question. Here they stand before those that name a target; with the
    detector ``always`` it is as published.
    """
    return [Row(label="icul", detector=Terms(), action=Flip())]
