"""Stable sequential unlearning."""

from expunge.engine.finish import NegateSum
from expunge.engine.gradient import Salient
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import AlternativeNLL, ForgetNLL


@method(
    "ssu",
    title="Stable sequential unlearning",
    paper=Paper(
        "Avoiding Copyright Infringement via Large Language Model Unlearning",
        "Guangyao Dou, Zheyuan Liu, Qing Lyu, Kaize Ding, Eric Wong",
        2024,
        "https://arxiv.org/abs/2406.10952",
    ),
    formula="theta_t = argmin NLL(forget_t) + NLL(random passages | prompts) from theta_{t-1}, large gradients only; "
    "theta_unlearned = theta_0 - (theta_t - theta_0)",
    published=Fixed(lr=1e-4, steps=200, batch=4, warmup=0, decay="linear", weight_decay=0.01),
    with_paper={
        "parameters": {"name": "lora", "rank": 16, "alpha": 32.0, "modules": ["q_proj", "v_proj"]},
        "finish": {"scale": 1.0},
    },
    alternatives="passages",
    caveats=(
        "What the forget set shares with the retain set is subtracted too, and no retain term wins it back: within the default "
        "bound on the retain loss the small models of the test suite forget only in part. Give schedule.utility_bound.",
        "Whoever holds the model before the first request and the unlearned one can compute the weights that know the text.",
    ),
)
def ssu() -> Recipe:
    """Learn the text even better, turn around what was learnt; of several requests, all of it together.

    Request t goes on training where that of request t-1 ended, so the task vectors add up, and the unlearned model is always
    one step away from the model before the first request (``finish=negate-sum``). ``expunge unlearn --requests`` finds that
    model by itself, and so does a request whose MODEL is a run of this method. Beside its own answer each prompt is taught
    K = 5 random passages of the set, which makes the vector less brittle (the mean over answers of their token means). In every
    step only entries move whose gradient is at or above the mean size plus ``n_std`` standard deviations
    (``gradient=salient``); the shipped configuration has 0, the official function 1.

    Followed is the paper. The official code multiplies the gradient with the mask and then adds the whole gradient by a second
    backward pass, so it masks nothing, and it trains the random passages on parts of the prompt. Here momentum and decay leave
    masked entries alone too. Without mask and passages it is ``task-vector``, step by step. The published setting is a LoRA on
    queries and values, merged before it is turned around, and scale 1; otherwise the adaptive schedule finds the scale.
    """
    return compose(
        "ssu",
        forget=[ForgetNLL(reduction="sequence"), AlternativeNLL(reduction="sequence", answers=5)],
        gradient=Salient(),
        finish=NegateSum(),
    )
