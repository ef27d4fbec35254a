"""Representation misdirection."""

from expunge.engine.parameters import LayerWindow
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.features import RMU, FeatureMatch


@method(
    "rmu",
    title="Representation misdirection for unlearning",
    paper=Paper(
        "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning",
        "Nathaniel Li, Alexander Pan, Anjali Gopal and others",
        2024,
        "https://arxiv.org/abs/2403.03218",
    ),
    formula="L = mean_tokens |h_l(forget) - c u|^2 + 1200 mean_tokens |h_l(retain) - h_l,ref(retain)|^2",
    published=Fixed(lr=5e-5, steps=150, epochs=None, batch=4, warmup=0.0, decay="constant", clip=None),
    together=("layer", "reduce", "tokens"),
    caveats=(
        "The coefficient 6.5 was chosen for the norm of the states of a 7B model: on others, compare it with that norm.",
        "On small models the published weight 1200 holds the forget states in place too: try retain.weight=10.",
        "It confuses the model on the forget set and does not erase what the weights hold: audit with relearning.",
    ),
)
def rmu() -> Recipe:
    """Steer the hidden states of forget text to a random direction, keep those of retain text where they were.

    Moves the MLP output matrices of the steered block and the two before it, as in the paper; widely used code moves all
    parameters, averages over hidden dimensions and takes coefficient 2 and retain weight 1 (``parameters=all reduce=mean
    coefficient=2 retain.weight=1``). ``layer``, ``reduce`` and ``tokens`` set all parts that have them. The block is the
    paper's 7th of 32, in proportion to the depth.
    """
    return compose("rmu", forget=[RMU()], retain=[FeatureMatch(weight=1200.0)], parameters=LayerWindow())
