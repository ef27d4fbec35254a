"""Primal-dual unlearning."""

from expunge.engine.balance import PrimalDual
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.distribution import FlatLogits
from expunge.methods.terms.likelihood import NLL


@method(
    "pdu",
    title="Primal-dual constrained entropic unlearning",
    paper=Paper(
        "Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models",
        "Taha Entesari, Arman Hatami, Rinat Khaziev, Anil Ramakrishna, Mahyar Fazlyab",
        2025,
        "https://arxiv.org/abs/2506.05314",
    ),
    formula="L = mean_tokens (max z - mean z)^2 (forget) + lambda (NLL(retain) - eps); lambda <- [lambda + step (NLL - eps)]+",
    published=Fixed(),
    caveats=(
        "eps is in nats and belongs to the model: take the retain loss at the start plus a margin.",
        "It drives the forget answers to a uniform distribution, which is not what a model that never saw them predicts.",
    ),
)
def pdu() -> Recipe:
    """Flatten the logits of the forget answers under the constraint that the retain loss stays below eps.

    The dual variable starts at 100, rests for five epochs and then moves by 5 times the violation once per optimiser step.
    """
    return compose("pdu", forget=[FlatLogits()], retain=[NLL()], balance=PrimalDual())
