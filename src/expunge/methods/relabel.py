"""Random labels: teach the forget rows other classes, with all weights or only the salient ones."""

from expunge.engine.parameters import SaliencyMask
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Turns
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL, AlternativeNLL


@method(
    "random-label",
    title="Random labels",
    paper=Paper(
        "Amnesiac Machine Learning", "Laura Graves, Vineel Nagisetty, Vijay Ganesh", 2021, "https://arxiv.org/abs/2010.10981"
    ),
    formula="L = NLL(forget rows with another class) + NLL(retain)",
    published=Turns(lr=1e-4, epochs=3, erase_epochs=3, batch=128, retain_batch=128, clip=None, weight_decay=0),
    alternatives="other",
    caveats=(
        "A row that is confidently another class than its own was trained on that: an attacker who knows the rows sees it.",
    ),
)
def random_label() -> Recipe:
    """Each forget row is taught a class drawn uniformly from the others, while the retain rows are repeated.

    The draw is made once, by the row's id and the seed; ``alternatives=any`` lets it fall on the true class too. Published
    epochs are passes over all rows, the forget rows first or shuffled among the others: ``schedule=paper`` takes them first. With
    other schedules both sides share every step.
    """
    return compose("random-label", forget=[AlternativeNLL()], retain=[NLL()])


@method(
    "salun",
    title="SalUn: random labels on salient weights",
    paper=Paper(
        "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency",
        "Chongyu Fan, Jiancheng Liu, Yihua Zhang, Eric Wong, Dennis Wei, Sijia Liu",
        2023,
        "https://arxiv.org/abs/2310.12508",
    ),
    formula="L = NLL(forget rows with a random class) + NLL(retain), on the half of the weights with the largest |d NLL(forget)|",
    published=Turns(
        lr=0.013,
        epochs=10,
        erase_epochs=10,
        batch=256,
        retain_batch=256,
        decay="cosine",
        optimizer="sgd",
        weight_decay=0,
        clip=None,
    ),
    alternatives="any",
    caveats=("The share of weights matters less than the rate and the number of steps.",),
)
def salun() -> Recipe:
    """Random labels, moving only the half of all weights in which the loss on the forget rows is steepest.

    Weights outside of the mask keep their value bit for bit: earlier official code let weight decay and momentum move them. (So
    weight decay is off altogether; the official code goes on with 5e-4 on the others.)
    The class is drawn from all, the true one too, as in the official code, but once and not anew in each epoch. At density 1 it
    is ``random-label`` with these draws.
    """
    return compose("salun", forget=[AlternativeNLL()], retain=[NLL()], parameters=SaliencyMask(density=0.5))
