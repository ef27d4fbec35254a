"""Cross-entropy unlearning."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.distribution import CEU


@method(
    "ceu",
    title="Cross-entropy unlearning",
    paper=Paper("CE-U: Cross Entropy Unlearning", "Bo Yang", 2025, "https://arxiv.org/abs/2503.01224"),
    formula="L = mean_tokens CE(softmax(z without the true token), p)(forget)",
    published=Fixed(),
    caveats=(
        "The first token of each answer is left alone, as published; answers of one token are then not forgotten (skip=0).",
        "Without a retain term small models lose what they should keep: add retain=nll.",
    ),
)
def ceu() -> Recipe:
    """Distil the model to its own prediction without the true token: needs neither a reference nor retain data.

    The published schedule is that of the other baselines on TOFU.
    """
    return compose("ceu", forget=[CEU()])
