"""Preference for another answer: DPO with given answers, with refusals (IdkDPO), with plausible alternates (AltPO)."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.retrain import TOFU
from expunge.methods.terms.likelihood import NLL
from expunge.methods.terms.preference import DPO

_FORMULA = "L = -(2/beta) mean log sigmoid(beta [log(p/p_ref)({winner}|x) - log(p/p_ref)(y|x)]) + NLL(retain)"


def _recipe(name: str) -> Recipe:
    return compose(name, forget=[DPO()], retain=[NLL()])


@method(
    "dpo",
    title="Direct preference optimisation for another answer",
    paper=Paper(
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafael Rafailov, Archit Sharma, Eric Mitchell, Stefano Ermon, Christopher D. Manning, Chelsea Finn",
        2023,
        "https://arxiv.org/abs/2305.18290",
    ),
    formula=_FORMULA.format(winner="alternative"),
    published=Fixed(),
    alternatives="refusals",
    caveats=("The factor 2/beta is not in the paper; it keeps the step comparable with NPO's.",),
)
def dpo() -> Recipe:
    """Prefer answers that you give (the records' alternatives) to the answers to forget; keep the retain set's likelihood.

    Where none are given, refusals stand in, and this is ``idkdpo``.
    """
    return _recipe("dpo")


@method(
    "idkdpo",
    title="Direct preference optimisation for refusals",
    paper=TOFU,
    formula=_FORMULA.format(winner="refusal"),
    published=Fixed(),
    alternatives="refusals",
    caveats=("The model learns to refuse: a refusal can tell that there is something to hide.",),
)
def idkdpo() -> Recipe:
    """DPO in which a refusal wins, one of a fixed list for each question.

    A baseline of TOFU (there without the factor 2/beta; its published code for it does not run, so the loss follows NPO's).
    """
    return _recipe("idkdpo")


@method(
    "altpo",
    title="Alternate preference optimisation",
    paper=Paper(
        "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models",
        "Anmol Mekala, Vineeth Dorna, Shreya Dubey, Abhishek Lalwani, David Koleczek, Mukund Rungta, Sadid Hasan, Elita Lobo",
        2024,
        "https://arxiv.org/abs/2409.13474",
    ),
    formula=_FORMULA.format(winner="alternate"),
    published=Fixed(epochs=2),
    alternatives="others",
    caveats=(
        "What the model will say instead is made up: give alternates that may be said.",
        "Answers of other records fit the question less well than generated ones.",
    ),
)
def altpo() -> Recipe:
    """DPO in which a plausible wrong answer of the same style wins, so that the model keeps answering.

    In the paper the model itself writes five alternates per question. Give your own in the records (``given``), or take the
    default, answers of other records (``others``), or a ``template``. The paper searches learning rate 1e-5 to 5e-5, beta
    0.05 to 0.5 and retain weight 1 to 5; the defaults are 1e-5, 0.1 and 1.
    """
    return _recipe("altpo")
