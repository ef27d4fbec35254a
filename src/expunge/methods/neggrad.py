"""NegGrad+: ascent on the forget set held in check by a much heavier descent on the retain set."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL, GradientAscent


@method(
    "neggrad-plus",
    title="NegGrad+",
    paper=Paper(
        "Towards Unbounded Machine Unlearning",
        "Meghdad Kurmanji, Peter Triantafillou, Jamie Hayes, Eleni Triantafillou",
        2023,
        "https://arxiv.org/abs/2302.09880",
    ),
    formula="L = alpha NLL(retain) - (1 - alpha) NLL(forget)",
    published=Fixed(
        lr=5e-4, epochs=5, over="retain", batch=32, warmup=0, decay="constant", optimizer="sgd", weight_decay=5e-4, clip=None
    ),
    caveats=("The forget side has no lower bound: alpha decides everything, and it is tuned anew for each setting.",),
)
def neggrad_plus() -> Recipe:
    """Gradient difference with unequal weights, alpha = 0.95 (the literature takes 0.9 to 0.9999).

    At alpha 1 it is fine-tuning, at alpha 1/2 half of gradient difference. The weights are those of the two terms:
    ``gradascent.weight`` is 1 - alpha, ``nll.weight`` is alpha. A published epoch is a pass over the retain set, beside which the
    forget set is repeated.
    """
    return compose("neggrad-plus", forget=[GradientAscent(weight=0.05)], retain=[NLL(weight=0.95)])
