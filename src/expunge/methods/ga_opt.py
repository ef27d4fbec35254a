"""Gradient ascent with random answers and a divergence: the LLMU recipe, as it was used for OPT models."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.mismatched import RandomAnswers
from expunge.methods.registry import method
from expunge.methods.terms.distribution import KL
from expunge.methods.terms.likelihood import AlternativeNLL, GradientAscent


@method(
    "ga-opt",
    title="Gradient ascent with random answers and a divergence (LLMU, GA for OPT)",
    paper=Paper(
        "Machine Unlearning in Large Language Models",
        "Saaketh Koundinya Gundavarapu, Shreya Agarwal, Arushi Arora, Chandana Thimmalapura Jagadeeshaiah",
        2024,
        "https://arxiv.org/abs/2405.15152",
    ),
    formula="L = -0.5 mean_i NLL_i(forget) / |y_i| + mean_{i, k} NLL(r_ik | x_i) / |r_ik| + KL(p_ref || p)(retain)",
    published=Fixed(lr=2e-6, steps=1000, epochs=None, batch=2, warmup=0.0, decay="linear", limit=100.0),
    caveats=(
        "The forget side has no lower bound, and published samples after it are runs of '#' and '!': measure fluency.",
        "Answers at random are not refusals: the model learns to be wrong about what it should not know.",
        "K random answers are K more forward passes per forget example.",
    ),
)
def ga_opt() -> Recipe:
    """Ascent on the forget answers, descent on K unrelated answers to the same prompts, a divergence on the retain set.

    The losses are those of LLMU (Yao et al. 2023, arXiv 2310.10683), with means over sequences of their token means, weights 0.5,
    1 and 1 and K = 5. The random answers come from the retain set (the preparation ``random-answers``). Published for harmful
    answers with rate 2e-6 and 1000 steps of two examples on all weights; for copyrighted text with LoRA (rank 16, alpha 32) and
    rate 1e-3 (``parameters.name=lora parameters.rank=16 parameters.alpha=32 schedule=paper schedule.lr=1e-3``). It ends when the
    forget loss is over a limit, of 100 as published, looked at once per pass; the adaptive schedule stops at the loss of unseen
    text instead.

    The published code departs from its own description, and is not followed: its limit on the loss is compared with a negative
    number and never stops anything; the random answers are trained together with their questions; on copyrighted text the
    reference of the divergence is the model itself, whose divergence has no gradient, and the random answers are single
    characters after the text to be forgotten. The divergence is written there as a cross-entropy: the same gradient, but not
    zero at the start.
    """
    return compose(
        "ga-opt",
        forget=[GradientAscent(weight=0.5, reduction="sequence"), AlternativeNLL(reduction="sequence")],
        retain=[KL()],
        preparation=RandomAnswers(),
    )
