"""Negative preference optimisation."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL
from expunge.methods.terms.preference import NPO


@method(
    "npo",
    title="Negative preference optimisation",
    paper=Paper(
        "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
        "Ruiqi Zhang, Licong Lin, Yu Bai, Song Mei",
        2024,
        "https://arxiv.org/abs/2404.05868",
    ),
    formula="L = -(2/beta) mean log sigmoid(-beta log(p(y|x) / p_ref(y|x))) + NLL(retain)",
    published=Fixed(),
    caveats=(
        "How far an answer is pushed depends on how well the reference knew it, so what was hardly known is pushed too far.",
        "What was forgotten may come back with a little relearning: audit for it.",
    ),
)
def npo() -> Recipe:
    """Preference optimisation that only knows losers: ascent that stops by itself once an answer is unlikely.

    This is the paper's NPO+RT (with the likelihood of the retain set, both weights 1), which is what people mean by NPO;
    the bare loss is ``retain=none``, NPO+KL is ``retain=kl``. The log-ratio is summed over tokens. Some published numbers
    labelled NPO come from a benchmark's code that applies the sigmoid to raw logits without labels; they are not comparable.
    """
    return compose("npo", forget=[NPO()], retain=[NLL()])
