"""FLAT: unlearning from forget data alone, by an f-divergence between template and forget answers."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.divergence import FDivergence


@method(
    "flat",
    title="Forget data only loss adjustment",
    paper=Paper(
        "LLM Unlearning via Loss Adjustment with Only Forget Data",
        "Yaxuan Wang, Jiaheng Wei, Chris Yuhao Liu, Jinlong Pang, Quan Liu, Ankit Parag Shah, Yujia Bao, Yang Liu, Wei Wei",
        2024,
        "https://arxiv.org/abs/2410.11143",
    ),
    formula="L = -g(P_e) + f*(g(P_f)), P = mean probability of the targets of the template (e) and forget (f) answers",
    published=Fixed(lr=1e-5, epochs=5, batch=64),
    alternatives="refusals",
    caveats=(
        "The gradient carries the probability as a factor: where the target gives the template less than about 0.001, both "
        "answers can go to 0 and the model with them; the run's notes say so.",
        "Nothing protects what is to be kept: given a retain set, the adaptive schedule stops at its bound before the goal. With "
        "retain=nll it goes on to the goal.",
        "All examples of a step must fit into one forward pass: raise engine.max_tokens, or take mean=example.",
    ),
)
def flat() -> Recipe:
    """Raise the probability of a template answer, lower that of the forget answer, by an f-divergence between them.

    Needs neither retain data nor a reference. Published with total variation (the default), KL, Jensen-Shannon and Pearson; the
    other four follow from the same table. With total variation and small probabilities the loss is about ``(P_f - P_e) / 2``:
    a gradient difference in probability space. The template of each question is one of a list of refusals, as on TOFU; for
    books, where the paper takes other text, ``--alternatives others``. The rates are 1e-5 on TOFU with batches of 16 accumulated
    four times (here one batch of 64, since a divergence of a mean is not the mean of divergences), 2e-7 for Llama-2-7B on
    Harry Potter.

    The official code averages over prompt and padding as well; here it is over the labelled targets (``mean=padded`` does as
    the code does). Its configuration names a loss that its trainer does not have; what is followed is the branch that has the
    divergences.
    """
    return compose("flat", forget=[FDivergence()])
