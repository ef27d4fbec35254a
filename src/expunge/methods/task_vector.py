"""Task-vector negation."""

from expunge.engine.finish import Negate
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import ForgetNLL


@method(
    "task-vector",
    title="Task-vector negation",
    paper=Paper(
        "Editing Models with Task Arithmetic",
        "Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, Hannaneh Hajishirzi, "
        "Ali Farhadi",
        2022,
        "https://arxiv.org/abs/2212.04089",
    ),
    formula="theta_ft = argmin NLL(forget) from theta; theta_unlearned = theta - scale (theta_ft - theta)",
    published=Fixed(),
    with_paper={"finish": {"scale": 5.0}},
    caveats=("What the forget set shares with the retain set is subtracted too.", "Integer buffers are left as they are."),
)
def task_vector() -> Recipe:
    """Learn the forget set even better, then go as far the other way.

    No gradient on the retain set. The published setting is that of the MUSE benchmark's baseline: 10 epochs at 1e-5 and scale 5;
    otherwise the adaptive schedule finds the scale.
    """
    return compose("task-vector", forget=[ForgetNLL()], finish=Negate())
