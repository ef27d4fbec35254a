"""NPO without a reference."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL
from expunge.methods.terms.preference import SimNPO


@method(
    "simnpo",
    title="Simple negative preference optimisation",
    paper=Paper(
        "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
        "Chongyu Fan, Jiancheng Liu, Licong Lin, Jinghan Jia, Ruiqi Zhang, Song Mei, Sijia Liu",
        2024,
        "https://arxiv.org/abs/2410.07163",
    ),
    formula="L = -0.125 (2/beta) mean log sigmoid(beta (NLL(y|x) / |y| - delta)) + NLL(retain)",
    published=Fixed(),
    caveats=("Beta has the opposite scale of NPO's: it multiplies a mean per token, so 2.5 to 4.5 is usual.",),
)
def simnpo() -> Recipe:
    """NPO on the length-normalised likelihood, with a constant in place of the reference.

    Needs no reference model. Defaults are those for TOFU forget10 (beta 4.5, coefficient 0.125); the authors take 2.5 and
    0.1375 for forget05, and on MUSE beta 0.7 with the retain term weighted 0.1. The MUSE branch of their code applies the
    sigmoid to raw logits without labels; we do not follow it.
    """
    return compose("simnpo", forget=[SimNPO(weight=0.125)], retain=[NLL()])
