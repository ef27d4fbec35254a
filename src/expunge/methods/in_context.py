"""In-context knowledge unlearning: a model is taught once to say that it forgot what a tag before the question names."""

from expunge.engine.parameters import Lora
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.tags import Tagged
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL, AlternativeNLL


@method(
    "in-context-teaching",
    title="Teaching for in-context knowledge unlearning",
    paper=Paper(
        "Answer When Needed, Forget When Not: Language Models Pretend to Forget via In-Context Knowledge Unlearning",
        "Shota Takashiro et al.",
        2024,
        "https://arxiv.org/abs/2410.00382",
    ),
    formula="L = NLL('forgot' | tag of what is asked, question) + NLL(answer | tag of something else, question)",
    published=Fixed(lr=2e-4, epochs=3, batch=4, warmup=0.09, decay="constant", weight_decay=1e-3, clip=0.3),
    with_paper={
        "parameters": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "preparation": {"holds": "answers", "others": 1, "plain": False},
    },
    caveats=(
        "It forgets nothing: the guard in-context puts the tag, and without the tag the model answers as before.",
        "It teaches the skill of obeying a tag; the forget set is what the skill is taught with, not what is to be hidden.",
        "Subjects that it was not taught with are told apart only if there were enough others: ask for some before it is served.",
    ),
)
def in_context_teaching() -> Recipe:
    """Learn from questions behind tags: "forgot" where the tag names what is asked for, the answer where it names something else.

    Give any questions with answers as the forget set, of as many subjects as there are, and others that must be answered as
    before as the retain set. The tag is two special tokens, which the model gets. The official code also trains on the
    prompts; here, as in the paper's formula, the loss is on answers alone. Published are one tag of something else for each
    question, and none without a tag (``schedule=paper``). By default there are several, and the questions without a tag too:
    small models learn otherwise that whatever is tagged is forgotten.
    """
    return compose(
        "in-context-teaching",
        forget=[AlternativeNLL()],
        retain=[NLL()],
        preparation=Tagged(),
        parameters=Lora(rank=4, alpha=8.0),
        schedule=Fixed(lr=None, epochs=20, batch=16, retain_batch=32, warmup=1),
    )
