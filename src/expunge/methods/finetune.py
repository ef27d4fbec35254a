"""Fine-tuning on the retain set: forgetting by neglect."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL


@method(
    "finetune",
    title="Fine-tuning on the retain set",
    paper=Paper(
        "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks",
        "Aditya Golatkar, Alessandro Achille, Stefano Soatto",
        2020,
        "https://arxiv.org/abs/1911.04933",
    ),
    formula="L = NLL(retain)",
    published=Fixed(),
    caveats=("It rarely forgets anything that the model knows well; it is a baseline.",),
)
def finetune() -> Recipe:
    """Go on training on the retain set and hope that the rest fades.

    A baseline of the unlearning literature (the paper named is one that uses it as such). It has no published schedule for
    language models; that of the other baselines on TOFU is used.
    """
    return compose("finetune", retain=[NLL()])
