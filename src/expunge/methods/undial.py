"""Self-distillation with adjusted logits."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.distribution import Undial


@method(
    "undial",
    title="Self-distillation with adjusted logits",
    paper=Paper(
        "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
        "Yijiang River Dong, Hongzhou Lin, Mikhail Belkin, Ramon Huerta, Ivan Vulić",
        2024,
        "https://arxiv.org/abs/2402.10052",
    ),
    formula="L = CE(softmax(z_ref - beta onehot(y)), p)(forget)",
    published=Fixed(lr=1e-4),
    with_paper={"parameters": {"name": "lora", "rank": 8, "alpha": 16.0}},
    caveats=(
        "It reads the reference's logits: a second copy in memory, unless on a LoRA.",
        "Without a retain term small models lose what they should keep: add retain=nll.",
    ),
)
def undial() -> Recipe:
    """Distil the model to itself with the true token pushed down: bounded, and stable over many steps.

    No retain term, as published. The paper trains a LoRA of rank 8 at 1e-4; ``schedule=paper`` brings both.
    """
    return compose("undial", forget=[Undial()])
