"""LoKU: an inverted hinge on probabilities, through a LoRA that begins where the forget set matters."""

from expunge.engine.parameters import Fila
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.hinge import InvertedHinge
from expunge.methods.terms.likelihood import NLL


@method(
    "loku",
    title="Low-rank knowledge unlearning: inverted hinge loss and Fisher-weighted LoRA",
    paper=Paper(
        "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs",
        "Sungmin Cha, Sungjun Cho, Dasol Hwang, Moontae Lee",
        2024,
        "https://arxiv.org/abs/2408.06621",
    ),
    formula="L = mean_tokens (1 + p(y) - max_{v != y} p(v))(forget) + NLL(retain), on W - s B A + s B A",
    published=Fixed(lr=1e-4, epochs=5),
    caveats=(
        "What is saved is an adapter with a base of its own (model/base): the adapter on the original weights is another model. "
        "In Python call merge_and_unload() before transformers' own save_pretrained().",
        "The most likely wrong answer takes the place of the forgotten one: look at what it is.",
        "It reads the retain set twice, once before training for the importance of the weights.",
    ),
)
def loku() -> Recipe:
    """Let the best rival of each forget token overtake it, moving only the part of the weights that matters to the forget set.

    The inverted hinge (IHL) is bounded and self-stopping, and unlike ascent does not spread the probability over the whole
    vocabulary. The LoRA begins by FILA: as the rank-r part of each matrix that is important to the forget set relative to the
    retain set, taken out of the frozen weight. ``parameters=lora`` is the ablation with a fresh LoRA, ``parameters=all`` the
    loss alone. Rank 32 with alpha twice the rank is the largest of those in the paper (4 to 32); rate 1e-4 is that for
    Llama-2-7B, 2e-4 for Phi-1.5. The retain loss is the plain token mean with weight 1.

    Where paper and code differ: the paper writes the Fisher information, the code squares the gradients of batches; the code is
    followed, since its damping 1e-5 was chosen for it.
    """
    return compose("loku", forget=[InvertedHinge()], retain=[NLL()], parameters=Fila(rank=32, alpha=64.0))
