"""Retraining: the gold standard."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL

TOFU = Paper(
    "TOFU: A Task of Fictitious Unlearning for LLMs",
    "Pratyush Maini, Zhili Feng, Avi Schwarzschild, Zachary C. Lipton, J. Zico Kolter",
    2024,
    "https://arxiv.org/abs/2401.06121",
)


@method(
    "retrain",
    title="Retraining without the forget set",
    paper=TOFU,
    formula="L = NLL(retain), from the untrained base",
    published=Fixed(lr=1e-5, epochs=5),
    caveats=(
        "It is exact only if it repeats the recipe by which the target was trained.",
        "One run is one sample: two retrained models differ too, so compare with two or three seeds.",
    ),
)
def retrain() -> Recipe:
    """Train again on the retain set only, from the base that the target was once trained from.

    This is what every other method is compared with, and the only one that forgets for certain. Use the schedule by which
    the target was trained; the published one is that of TOFU for Llama-2-7B (2e-5 instead of 1e-5 for Phi).
    """
    return compose("retrain", retain=[NLL()], start="initial")
