"""Offset unlearning: a small model unlearns in the large one's place, and the difference that it makes is added to its scores."""

from expunge.engine.parameters import OffsetPair
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL, GradientAscent


@method(
    "offset",
    title="Offset unlearning (delta-unlearning)",
    paper=Paper(
        "Offset Unlearning for Large Language Models",
        "James Y. Huang, Wenxuan Zhou, Fei Wang, Fred Morstatter, Sheng Zhang, Hoifung Poon, Muhao Chen",
        2024,
        "https://arxiv.org/abs/2404.11045",
    ),
    formula="z = z_target + w (z_small,theta - z_small,0); L = -NLL_z(forget) + NLL_z(retain)",
    published=Fixed(lr=1e-5, epochs=5, batch=32),
    caveats=(
        "It only suppresses: the target's weights are untouched and part of the result, and who has them can ask the target.",
        "Three models run for every token, each with a cache of keys and values.",
        "The forget side has no lower bound and wins in the long run; forget=npo, or forget=alternative-nll, have one.",
        "Without a small model of the target's family the target's own first blocks take its place.",
    ),
)
def offset() -> Recipe:
    """A small model with a LoRA learns, with the loss of the sum, what has to be added to the scores of the frozen target.

    The offset is 0 at the start, exactly, so the result begins as the target. Any loss can be used, ``forget=npo retain=kl`` or
    ``forget=alternative-nll`` (data relabelling); by default it is the gradient difference, one of those in the paper. The loss
    is that of the sum: a small model that unlearns by itself moves its scores where the target's are not.

    ``small=FOLDER`` names the small model (in the paper 7B beside 13B); it needs the target's tokenizer, but need not know
    what is to be forgotten. Without one the target's first blocks stand in, as in ULD, which the paper does not do. There
    is no official code. Passes and batch are the paper's; its learning rate is not known to us, and the one given is that
    of an independent implementation, which trains all weights of the small model, where a LoRA moves here.

    The result is one model. As a guard: the action ``offset`` with ``tuned=RUN``, before a server that holds the target already.
    """
    return compose("offset", forget=[GradientAscent()], retain=[NLL()], parameters=OffsetPair())
