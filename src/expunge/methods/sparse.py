"""Fine-tuning towards few weights, or with few weights."""

from expunge.engine.parameters import Pruned
from expunge.engine.parts import Paper, Recipe
from expunge.engine.penalty import L1
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL

PAPER = Paper(
    "Model Sparsity Can Simplify Machine Unlearning",
    "Jinghan Jia, Jiancheng Liu, Parikshit Ram, Yuguang Yao, Gaowen Liu, Yang Liu, Pranay Sharma, Sijia Liu",
    2023,
    "https://arxiv.org/abs/2304.04934",
)
PUBLISHED = Fixed(lr=0.01, epochs=10, batch=256, warmup=0, decay="constant", optimizer="sgd", weight_decay=5e-4, clip=None)


@method(
    "l1-sparse",
    title="Sparsity-aware fine-tuning",
    paper=PAPER,
    formula="L = NLL(retain) + gamma_t ||theta||_1, gamma_t falling linearly to 0",
    published=PUBLISHED,
    caveats=("gamma is a sum over all weights: what forgets on one model ruins another. Try 1e-5 to 1e-3.",),
)
def l1_sparse() -> Recipe:
    """Fine-tune on the retain set while the size of the weights is pressed down: what only the forget set needed goes first.

    All weights are pressed, biases and norms too. The paper multiplies the rate by 0.1 at milestones; here it is constant.
    """
    return compose("l1-sparse", retain=[NLL()], penalty=L1())


@method(
    "prune-finetune",
    title="Prune first, then unlearn",
    paper=PAPER,
    formula="theta <- 0 for the 95 % smallest weights, which stay 0; then L = NLL(retain)",
    published=PUBLISHED,
    caveats=(
        "Pruning a dense model at once costs accuracy, which must be won back: the published models were sparse before.",
        "Any other method forgets on the sparse model too: parameters=pruned.",
    ),
)
def prune_finetune() -> Recipe:
    """Set the smallest weights of all to 0, then fine-tune what is left on the retain rows, with the zeros fixed.

    The distance of an unlearned from a retrained model grows with the number of weights that can move. In the paper the model
    that is asked to forget is sparse already: pruned, set back to an early epoch and trained again on all rows with the zeros
    fixed. Do so with ``parameters=pruned`` in its training; here its zeros then are the mask. A dense model is pruned on the
    spot.
    """
    return compose("prune-finetune", retain=[NLL()], parameters=Pruned())
