"""O3: an orthogonal low-rank update per request, loaded as far as a detector finds an input near to it."""

from expunge.engine.finish import Gate
from expunge.engine.parameters import LoraBeside
from expunge.engine.parts import Paper, Recipe
from expunge.engine.penalty import Orthogonal
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.detector import OODDetector
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import AlternativeNLL


@method(
    "o3",
    title="O3: orthogonal LoRA and an out-of-distribution detector",
    paper=Paper(
        "On Large Language Model Continual Unlearning",
        "Chongyang Gao, Lixu Wang, Kaize Ding, Chenkai Weng, Xiao Wang, Qi Zhu",
        2024,
        "https://arxiv.org/abs/2407.10223",
    ),
    formula=(
        "L = NLL(random answers | prompts) + lambda / layers sum ||A_s A_t'||^2; "
        "result: W x + w(prompt) scale B A x, w = sigmoid(10 c - 2), c = 1 - |F(s) - F(2 s0 - s)| of the detector's score s"
    ),
    published=Fixed(lr=3e-4, epochs=15, batch=128, warmup=0, weight_decay=0),
    with_paper={
        "parameters": {"dropout": 0.05, "begins": "last"},
        "preparation": {"encoder": "roberta-large"},
        "finish": {"scale": 1.0, "level": 0.0},
    },
    alternatives="others",
    caveats=(
        "It only suppresses: the target's weights are untouched and part of the result, and who has them can ask the target.",
        "What the detector takes for something else is answered as before: look at the notes on how well it tells prompts apart. "
        "It tells subjects from each other, not one person from others who are asked about in the same words.",
        "Every request adds an update and a detector, and each detector reads every prompt.",
        "Only the prompt decides: what is asked later in a conversation is judged with all that came before it.",
        "The detector keeps features of the forget prompts, one vector for each prompt and layer.",
    ),
)
def o3() -> Recipe:
    """Learn random answers to the forget prompts in a LoRA beside the target, and load it only where a detector says so.

    No retain data are read. Random labelling follows the paper, which draws one of five option letters for each multiple-choice
    question, the true one included; questions with free answers get the answer of a record of another subject
    (``alternatives``). The loss is on the answer; the published code trains on the prompt too.

    A request on the result of an earlier one adds an update and a detector. The factors A of all earlier updates are held
    orthogonal (``penalty.weight=0`` switches that off). By default each update has its own weight, so an earlier request stays
    as it was; in the published code one update goes on learning (``parameters.begins=last``) and is loaded with the largest
    weight over all requests, though the penalty drives it out of what it had learnt to read.

    The weight is the paper's, with two changes. Its smallest value is 0.12, so nothing would be left to the target alone:
    below ``finish.level`` it is 0 here. And the mixture is fitted on held-out forget prompts, where the published code takes
    test prompts. ``finish.rule=official`` is the published evaluation, which does not use the soft weight: over 0.9 it counts as
    1.2, over 0.3 and up to 0.4 as it is, and everything else as 0 (its comments name other thresholds for each task).
    ``preparation.signs=official`` is its score. ``schedule=paper`` needs roberta-large as the detector's encoder.
    """
    return compose(
        "o3",
        forget=[AlternativeNLL()],
        preparation=OODDetector(),
        parameters=LoraBeside(rank=8, alpha=16.0),
        penalty=Orthogonal(),
        finish=Gate(),
    )
