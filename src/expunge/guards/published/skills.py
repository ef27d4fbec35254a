"""Effective Skill Unlearning: two guards that need no training."""

from __future__ import annotations

from expunge.engine.parts import Paper
from expunge.guards.actions.neuron_adjust import NeuronAdjust
from expunge.guards.actions.refuse import Refuse
from expunge.guards.detectors.always import Always
from expunge.guards.detectors.key_space import KeySpace
from expunge.guards.named import guard
from expunge.guards.policy import Row

_PAPER = Paper(
    "Effective Skill Unlearning through Intervention and Abstention",
    "Yongce Li, Chung-En Sun, Tsui-Wei Weng",
    2025,
    "https://arxiv.org/abs/2503.21730",
)


@guard(
    "key-space",
    title="Key Space Detection",
    paper=_PAPER,
    caveats=(
        "The box is the hull of the probes' keys: with few probes, questions of the skill fall outside.",
        "One dimension outside is enough to escape; another way of asking can do that.",
        "alpha has no scale of its own, and is set by trial for each skill.",
    ),
)
def key_space() -> list[Row]:
    """Refuses requests of a skill, known by the key that their last token leaves in the last feed-forward layer."""
    return [Row(label="key-space", detector=KeySpace(), action=Refuse())]


@guard(
    "neuron-adjust",
    title="Neuron Adjust",
    paper=_PAPER,
    caveats=(
        "Skills that live in attention rather than in feed-forward units are hardly touched.",
        "Which values move is drawn: answers of what is to stay may change, too.",
    ),
)
def neuron_adjust() -> list[Row]:
    """Moves feed-forward units that rise for a skill to where they are for what is to stay, in every request."""
    return [Row(label="neuron-adjust", detector=Always(), action=NeuronAdjust())]
