"""Gradient ascent with weights per token: WGA and SatImp."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL
from expunge.methods.terms.weighted import WGA, SatImp


@method(
    "wga",
    title="Weighted gradient ascent",
    paper=Paper(
        "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond",
        "Qizhou Wang, Jin Peng Zhou, Zhanke Zhou, Saebyeol Shin, Bo Han, Kilian Q. Weinberger",
        2025,
        "https://arxiv.org/abs/2502.19301",
    ),
    formula="L = -mean_tokens p^beta NLL(forget) + NLL(retain)",
    published=Fixed(),
    caveats=("The right beta depends on the task; the authors' code has 5, most others 1.",),
)
def wga() -> Recipe:
    """Ascent in which a token counts by how probable it still is, so what is forgotten is left alone.

    With the likelihood of the retain set, weight 1, as it is usually run; ``retain=none`` is the bare objective.
    """
    return compose("wga", forget=[WGA()], retain=[NLL()])


@method(
    "satimp",
    title="Saturation and importance reweighting",
    paper=Paper(
        "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning",
        "Puning Yang, Qizhou Wang, Zhuo Huang, Tongliang Liu, Chengqi Zhang, Bo Han",
        2025,
        "https://arxiv.org/abs/2505.11953",
    ),
    formula="L = -0.1 mean_tokens p^beta1 (1 - p)^beta2 NLL(forget) + NLL(retain)",
    published=Fixed(),
    caveats=("A token that the model predicts with certainty has weight 0: fully memorised text moves slowly at first.",),
)
def satimp() -> Recipe:
    """Ascent that leaves alone both what is forgotten and what any model would predict.

    Forget weight 0.1 and retain weight 1, the authors' choice; a widely used toolkit has them so in its configuration file and
    the other way round in its code. The authors use beta1 5 or 6 with beta2 1.
    """
    return compose("satimp", forget=[SatImp(weight=0.1)], retain=[NLL()])
