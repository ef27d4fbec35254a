"""Boundary unlearning: the forget rows become part of the classes around them."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.grown import ExtraClass
from expunge.methods.preparations.nearest import NearestClasses
from expunge.methods.registry import method
from expunge.methods.terms.expanded import ExtraClassNLL
from expunge.methods.terms.likelihood import AlternativeNLL

PAPER = Paper(
    "Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision Boundary",
    "Min Chen, Weizhuo Gao, Gaoyang Liu, Kai Peng, Chen Wang",
    2023,
    "https://arxiv.org/abs/2303.11570",
)
PUBLISHED = Fixed(
    lr=1e-5, epochs=10, batch=64, optimizer="sgd", momentum=0.9, warmup=0, decay="constant", weight_decay=0, clip=None
)


@method(
    "boundary-shrink",
    title="Boundary shrink",
    paper=PAPER,
    formula="L = NLL(forget rows with the class that the target sees in x + bound sign(d loss / d x))",
    published=PUBLISHED,
    caveats=(
        "A row whose class the adversarial step does not change is taught its own class again.",
        "The bound of 0.1 is meant for images of normalised numbers.",
    ),
)
def boundary_shrink() -> Recipe:
    """Each forget row is taught the class whose region is nearest, so that the region of its own class shrinks.

    The nearest class is what the target sees in the row after one step of the fast gradient sign method from the row itself. Only
    forget rows are trained on; add ``retain=nll`` to repair the rest. Made for whole classes. Of the published setting the batch
    size is ours.
    """
    return compose("boundary-shrink", forget=[AlternativeNLL()], preparation=NearestClasses())


@method(
    "boundary-expand",
    title="Boundary expanding",
    paper=PAPER,
    formula="L = NLL(forget rows with a further class K+1), whose row of the last layer is dropped at the end",
    published=PUBLISHED,
    together=("layer",),
    caveats=(
        "What the K classes say of the forget rows once the further class is gone is not taught: look at it.",
        "On several processes it does not run.",
    ),
)
def boundary_expand() -> Recipe:
    """The forget rows are taught a class that does not exist, so that their region is taken away from the classes that do.

    A row with fresh weights is added to the last layer, all weights are fine-tuned on the forget rows alone, and the row is
    dropped. Made for whole classes; add ``retain=nll`` to repair the rest.
    """
    return compose("boundary-expand", forget=[ExtraClassNLL()], preparation=ExtraClass())
