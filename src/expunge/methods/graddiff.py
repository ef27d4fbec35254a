"""Gradient difference: ascent on the forget set, descent on the retain set (likelihood or divergence)."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.retrain import TOFU
from expunge.methods.terms.distribution import KL
from expunge.methods.terms.likelihood import NLL, GradientAscent


@method(
    "graddiff",
    title="Gradient difference",
    paper=Paper(
        "Continual Learning and Private Unlearning", "Bo Liu, Qiang Liu, Peter Stone", 2022, "https://arxiv.org/abs/2203.12817"
    ),
    formula="L = -NLL(forget) + NLL(retain)",
    published=Fixed(),
    caveats=("The forget side has no lower bound and wins in the long run.", "It can over-fit the retain data that it sees."),
)
def graddiff() -> Recipe:
    """Ascent on the forget set against descent on the retain set, one retain example per forget example.

    Also called GA+GDR. Both means are over tokens and both coefficients 1, as in TOFU.
    """
    return compose("graddiff", forget=[GradientAscent()], retain=[NLL()])


@method(
    "graddiff-kl",
    title="Gradient difference with a divergence on the retain set",
    paper=TOFU,
    formula="L = -NLL(forget) + KL(p_ref || p)(retain)",
    published=Fixed(),
    caveats=(
        "The forget side has no lower bound.",
        "It reads the reference's logits: a second copy in memory, unless on a LoRA.",
    ),
)
def graddiff_kl() -> Recipe:
    """Ascent on the forget set while the predictions on the retain set stay those of the target.

    Also called GA+KLR and, in TOFU, KL minimisation. The divergence is averaged over supervised targets; the original code
    averages over prompt and padding too.
    """
    return compose("graddiff-kl", forget=[GradientAscent()], retain=[KL()])
