"""WPN: an N-pair contrast of hidden states, with the likelihood of the harmless answer."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.contrastive import NPair
from expunge.methods.terms.likelihood import AlternativeNLL


@method(
    "wpn",
    title="Weighted positional N-pair learning",
    paper=Paper(
        "WPN: An Unlearning Method Based on N-pair Contrastive Learning in Language Models",
        "Guitao Chen, Yunshen Wang, Hongye Sun, Guang Chen",
        2024,
        "https://arxiv.org/abs/2408.09459",
    ),
    formula="L = mean_i log(1 + sum_j exp(s(a_i, n_j) - s(a_i, p_i))) + NLL(harmless answer | prompt)",
    published=Fixed(lr=1e-5, epochs=5, batch=16, warmup=0.0, weight_decay=0.0),
    alternatives="refusals",
    caveats=(
        "The paper's details could not be checked and it has no code: anchor, similarity, weight of the likelihood and the "
        "schedule are our reading of its abstract and of reviews.",
        "Nothing protects what is to be kept: add retain=nll, which is not part of the method as described.",
        "The harmless answer takes the first place, but the old one stays more likely than unseen text: the goal of the adaptive "
        "schedule is not reached, so give a fixed one.",
        "All examples of a step must fit into one forward pass: they are each other's negatives.",
    ),
)
def wpn() -> Recipe:
    """Bring the prompt's hidden states near those of the harmless answer and away from the harmful ones, and teach that answer.

    Made for prompts that call forth harmful text: the forget answer is the harmful one, the other one is harmless (the records'
    ``alternatives``, or a refusal). States are pooled with weights that grow with the position. The contrast alone moves
    embeddings, not what is generated, so the likelihood of the harmless answer is added with weight 1.
    """
    return compose("wpn", forget=[NPair(), AlternativeNLL(reduction="sequence")])
