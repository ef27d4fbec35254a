"""UNSIR: impair a class with noise, then repair the others."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Repair
from expunge.methods.compose import compose
from expunge.methods.preparations.noise import Noise
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL, AlternativeNLL

PUBLISHED = Repair(lr=0.02, repair_lr=0.01, epochs=1, repair_epochs=1, batch=256, weight_decay=0, clip=None)


@method(
    "unsir",
    title="UNSIR: impair and repair",
    paper=Paper(
        "Fast Yet Effective Machine Unlearning",
        "Ayush K. Tarun, Vikram S. Chundawat, Murari Mandal, Mohan Kankanhalli",
        2021,
        "https://arxiv.org/abs/2111.08947",
    ),
    formula="impair: L = NLL(noise with the forget rows' classes) + NLL(retain); repair: L = NLL(retain)",
    published=PUBLISHED,
    caveats=(
        "Made for whole classes: noise that is no row of a class says nothing about single rows.",
        "Rate and number of steps decide: other published code takes 1e-4, at which a small network forgets nothing.",
        "On a small network plain noise forgot a class as well as the learnt one did, and broke less of the rest on the way.",
        "The adaptive schedule finds no rate for it: small steps teach the class better before large ones break it.",
    ),
)
def unsir() -> Recipe:
    """The model is taught that noise, made to look least like the class, is the class; the rows that stay repair the rest.

    The noise maximises the target's error and needs no forget row, only its class. The published first part is one pass over
    noise and 500 to 1,000 retain rows of each class, the second one over these retain rows; here an epoch of the first part is a
    pass over as many noisy inputs as there are forget rows, with as many retain rows in each step.
    """
    return compose("unsir", forget=[AlternativeNLL()], retain=[NLL()], preparation=Noise(), schedule=PUBLISHED)
