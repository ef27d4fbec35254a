"""Fine-tuning towards few weights."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.penalty import L1
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL


@method(
    "l1-sparse",
    title="Sparsity-aware fine-tuning",
    paper=Paper(
        "Model Sparsity Can Simplify Machine Unlearning",
        "Jinghan Jia, Jiancheng Liu, Parikshit Ram, Yuguang Yao, Gaowen Liu, Yang Liu, Pranay Sharma, Sijia Liu",
        2023,
        "https://arxiv.org/abs/2304.04934",
    ),
    formula="L = NLL(retain) + gamma_t ||theta||_1, gamma_t falling linearly to 0",
    published=Fixed(lr=0.01, epochs=10, batch=256, warmup=0, decay="constant", optimizer="sgd", weight_decay=5e-4),
    caveats=("gamma is a sum over all weights: what forgets on one model ruins another. Try 1e-5 to 1e-3.",),
)
def l1_sparse() -> Recipe:
    """Fine-tune on the retain set while the size of the weights is pressed down: what only the forget set needed goes first.

    All weights are pressed, biases and norms too. The paper multiplies the rate by 0.1 at milestones; here it is constant.
    """
    return compose("l1-sparse", retain=[NLL()], penalty=L1())
