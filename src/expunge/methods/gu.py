"""Geometric-disentanglement unlearning."""

from expunge.engine.gradient import Project
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Adaptive, Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.distribution import KL
from expunge.methods.terms.preference import NPO


@method(
    "gu",
    title="Geometric-disentanglement unlearning",
    paper=Paper(
        "Geometric-disentangelment Unlearning",
        "Duo Zhou, Yuji Zhang, Tianxin Wei and others",
        2025,
        "https://arxiv.org/abs/2511.17100",
    ),
    formula="d = -(g_f - (<g_f, g_r>_H / <g_r, g_r>_H) g_r + g_r), g_f of NPO, g_r of KL(retain), H the metric of the optimiser",
    published=Fixed(lr=1e-5, epochs=10, momentum=0.0, weight_decay=0.0),
    caveats=(
        "Exact to first order and for the retain batch of the step alone: what is kept elsewhere is kept as far as it is alike.",
        "It needs two gradients in memory, and two backward passes at each step.",
    ),
)
def gu() -> Recipe:
    """NPO whose gradient is projected away from the retain gradient, in the metric of AdamW without momentum.

    GU is a rule for the gradient, and wraps any method with a forget and a retain term: ``gradient=project
    gradient.geometry=optimizer schedule.momentum=0 schedule.weight_decay=0``. This is one of the published crossings (NPO with
    beta 0.1, the retain gradient that of the divergence from the target), with the rank-1 form over all tensors;
    ``gradient.directions=8 gradient.scope=tensor`` is the form with a basis of recent retain gradients for each tensor.
    Revisions of the official code differ: one never calls its projection and never refreshes its basis; here both happen at
    every step. The published trainer projects the last five blocks, the last norm and the head alone (``gradient.tensors``);
    here all tensors that move, as in the theory.
    """
    return compose("gu", forget=[NPO()], retain=[KL()], gradient=Project(geometry="optimizer"), schedule=Adaptive(momentum=0.0))
