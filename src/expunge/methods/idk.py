"""Learning to say "I don't know"."""

from expunge.engine.parts import Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.retrain import TOFU
from expunge.methods.terms.likelihood import NLL, AlternativeNLL


@method(
    "idk-nll",
    title="Fine-tuning on refusals",
    paper=TOFU,
    formula="L = NLL(refusal | forget question) + NLL(retain)",
    published=Fixed(),
    alternatives="refusals",
    caveats=(
        "Nothing pushes the old answer down: it becomes unlikely as a first choice and often stays recoverable.",
        "Refusing can spread to questions that should be answered.",
    ),
)
def idk_nll() -> Recipe:
    """Train refusals as the answers to the forget questions, and the retain answers as they are.

    TOFU calls it preference optimisation (its loss has no preference in it); others IDK.
    """
    return compose("idk-nll", forget=[AlternativeNLL()], retain=[NLL()])
