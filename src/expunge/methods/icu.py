"""ICU: iterative contrastive unlearning, each forget record beside its nearest neighbour, until it is no longer said."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.controls.overlap_flags import OverlapFlags
from expunge.methods.preparations.neighbours import NearestRecords
from expunge.methods.registry import method
from expunge.methods.terms.distribution import KL
from expunge.methods.terms.likelihood import NLL, GradientAscent


@method(
    "icu",
    title="Iterative contrastive unlearning",
    paper=Paper(
        "Learn while Unlearn: An Iterative Unlearning Framework for Generative Language Models",
        "Haoyu Tang, Ye Liu, Xi Zhao, Xukai Liu, Yanghai Zhang, Kai Zhang, Xiaofang Zhou, Enhong Chen",
        2024,
        "https://arxiv.org/abs/2407.20271",
    ),
    formula="L = -NLL(forget) + 0.5 NLL(neighbours) + KL(p_ref || p)(neighbours), over the records that the model still says",
    published=Fixed(lr=5e-6, epochs=100, batch=8, second_moment=0.98, warmup=0, decay="constant", weight_decay=0, clip=None),
    caveats=(
        "Only retain records that are the nearest of a forget record are read: the rest of the retain set is not kept by it.",
        "After every pass each forget record is continued by the model: on a large forget set take a larger control.every.",
    ),
)
def icu() -> Recipe:
    """Ascent on each forget record, and descent with a divergence on the retain record that is most like it.

    After every pass over the forget set the model continues each record; those whose continuation has little in common with the
    truth rest, with their neighbours, until they are said again; training ends when all rest or when memorisation accuracy and
    extraction likelihood are low enough. Pairing (``preparation=nearest-records``) and flags (``control=overlap-flags``) are
    parts that any recipe can use; each says where it departs from the paper.

    The divergence replaces the cross-entropy to the target's predictions, which has the same gradient. The code's caching of
    whole distributions is not needed: the target is a second copy, or the same weights on a LoRA. A batch of resting records is
    no step (there it has no value). The limit of 100 passes is ours; the published stop comes long before.
    """
    return compose(
        "icu",
        forget=[GradientAscent()],
        retain=[NLL(weight=0.5), KL()],
        preparation=NearestRecords(),
        control=OverlapFlags(),
    )
