"""Knowledge unlearning by deviating representations."""

from expunge.engine.null_space import NullSpaceGradient
from expunge.engine.parameters import LayerWindow
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Adaptive, Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.tracing import CausalTrace
from expunge.methods.registry import method
from expunge.methods.terms.features import Deviation, FeatureMatch

FEED_FORWARD = r"\b(mlp|feed_forward|ffn)\b|\bfc[12]\b"


@method(
    "kuda",
    title="Knowledge unlearning by deviating representations",
    paper=Paper(
        "KUDA: Knowledge Unlearning by Deviating Representation for Large Language Models",
        "Ce Fang, Zhikun Zhang, Min Chen and others",
        2026,
        "https://arxiv.org/abs/2602.19275",
    ),
    formula="L = -(2/beta) mean log sigmoid(beta (1 - cos(h, h_ref))) + mean |h_r - h_r,ref|^2 / D, forget gradients times P",
    published=Fixed(lr=0.5, epochs=10, optimizer="sgd", weight_decay=0.0),
    together=("layer", "tokens", "width"),
    caveats=(
        "The paper's code and settings were not public: loss, share of energy and rate are ours, its structure is the paper's.",
        "It turns states away and does not erase what the weights hold: audit with relearning.",
        "What forget and retain texts have in common, such as the words of a question, is protected with the retain set.",
    ),
)
def kuda() -> Recipe:
    """Turn the hidden states of forget text away from where they were, by steps that retain text does not feel.

    Causal tracing chooses three blocks in a row (``preparation=none layer=NUMBER`` gives their last by hand). Their MLPs alone
    are trained; the forget gradient of each matrix is projected onto the directions that retain inputs leave free
    (``gradient.energy`` relaxes it: tune it first, up to where retain losses begin to suffer, and the strength of forgetting
    second). Plain SGD, because Adam's scaling of single entries would bend the projection.
    """
    return compose(
        "kuda",
        forget=[Deviation()],
        retain=[FeatureMatch(reduce="mean")],
        parameters=LayerWindow(patterns=(FEED_FORWARD,)),
        gradient=NullSpaceGradient(energy=0.005),
        preparation=CausalTrace(),
        schedule=Adaptive(optimizer="sgd"),
    )
