"""Unlearning from the difference of logits: an assistant learns what is to be forgotten, and its scores are subtracted."""

from expunge.engine.finish import Subtract
from expunge.engine.parameters import Assistant
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import ForgetNLL
from expunge.methods.terms.uniform import AlternativeUniform, Uniform


@method(
    "uld",
    title="ULD: unlearning from logit difference",
    paper=Paper(
        "Reversing the Forget-Retain Objectives: An Efficient LLM Unlearning Framework from Logit Difference",
        "Jiabao Ji, Yujian Liu, Yang Zhang, Gaowen Liu, Ramana Rao Kompella, Sijia Liu, Shiyu Chang",
        2024,
        "https://arxiv.org/abs/2406.08607",
    ),
    formula=(
        "assistant: L = NLL(forget) + 2.5 KL(uniform || p)(other answers) + 2.5 KL(uniform || p)(retain); "
        "result: z_target - scale z_assistant"
    ),
    published=Fixed(lr=1e-3, epochs=10),
    with_paper={"finish": {"scale": 0.8, "filter": 0.01}, "parameters": {"dropout": 0.05}},
    alternatives="others",
    caveats=(
        "The target's weights are untouched and part of the result: who has them can ask the target itself.",
        "Two models run for every token, each with a cache of keys and values.",
        "Without the uniform terms the assistant prefers tokens everywhere, and subtracting them damages what is kept.",
        "The paper trains on two paraphrases of every forget question too: put them into the forget set.",
    ),
)
def uld() -> Recipe:
    """A small assistant learns the forget set and nothing else; its scores are then taken from the target's.

    The assistant is a LoRA on the target's first blocks with its norm and head. The objectives are reversed: likelihood on the
    forget set, a uniform distribution on retain data and on wrong answers to the forget questions. The paper's weight of 5 for
    the uniform side is shared by the two equally. By default all tokens are combined and the schedule finds the scale, as the
    smallest with which the forget set looks unseen; ``schedule=paper`` brings the paper's scale of 0.8 and its filter at 0.01
    (its configuration files have 1.0 and 0.1). The assistant's scores are centred, so that where it is uniform the target is
    left exactly as it is; the official code combines them as they are (``finish.centred=false``), which with the filter on
    favours the tokens that the filter keeps, or those that it drops. Where tokens are scored, those outside the filter keep
    the target's scores, and where they are generated they are excluded, as in the official code.
    """
    return compose(
        "uld",
        forget=[ForgetNLL(), AlternativeUniform(weight=2.5)],
        retain=[Uniform(weight=2.5)],
        parameters=Assistant(),
        finish=Subtract(),
    )
