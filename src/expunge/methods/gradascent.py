"""Gradient ascent on the forget set."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import GradientAscent


@method(
    "gradascent",
    title="Gradient ascent",
    paper=Paper(
        "Knowledge Unlearning for Mitigating Privacy Risks in Language Models",
        "Joel Jang, Dongkeun Yoon, Sohee Yang, Sungmin Cha, Moontae Lee, Lajanugen Logeswaran, Minjoon Seo",
        2022,
        "https://arxiv.org/abs/2210.01504",
    ),
    formula="L = -NLL(forget)",
    published=Fixed(),
    caveats=(
        "The loss has no lower bound: run long enough, it destroys the model.",
        "With reduction=token a long answer weighs more than a short one; reduction=sequence is that of the paper.",
    ),
)
def gradascent() -> Recipe:
    """Climb the loss of the forget set, and nothing else.

    The mean is over tokens, as in TOFU and in most toolkits, and so is the published schedule (learning rate 1e-5); Jang et
    al. average per sequence, use 5e-5 with 32 samples a step, and stop by memorisation thresholds.
    """
    return compose("gradascent", forget=[GradientAscent()])
