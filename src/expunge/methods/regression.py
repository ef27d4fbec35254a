"""Unlearning of regressors: Blindspot goes to a network that never saw the rows, Gaussian amnesiac to random numbers."""

from expunge.engine.balance import ByCount
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.numbers import NormalTargets
from expunge.methods.preparations.proxy import Proxy
from expunge.methods.registry import method
from expunge.methods.terms.features import AttentionMaps
from expunge.methods.terms.likelihood import NLL, AlternativeNLL
from expunge.methods.terms.numbers import IncompetentError

PAPER = Paper(
    "Deep Regression Unlearning",
    "Ayush K Tarun, Vikram S Chundawat, Murari Mandal, Mohan Kankanhalli",
    2023,
    "https://arxiv.org/abs/2210.08196",
)
PUBLISHED = Fixed(lr=1e-3, epochs=1, batch=256, warmup=0, decay="constant", weight_decay=0, clip=None)


@method(
    "blindspot",
    title="Blindspot",
    paper=PAPER,
    formula="L = c [|m - m_B|(forget) + beta sum_l mean (A_l - A_l,B)^2 (forget)] + (1 - c) loss(retain), c = |forget| / |step|",
    published=PUBLISHED,
    with_paper={"preparation": {"name": "proxy", "epochs": 2.0, "lr": 0.01, "batch": 256}},
    caveats=(
        "A proxy that learns long is a retrained model, and one that learns too little answers at random.",
        "The paper cuts batches from all data, mixed; here a step has as many retain rows as forget rows unless "
        "schedule.retain_batch says otherwise, and c follows from the step.",
    ),
)
def blindspot() -> Recipe:
    """Forget predictions, and where the layers look, go to those of a proxy that has learnt the retain set for a few epochs.

    The proxy B is a fresh network of the same shape; beta 50 is the paper's, and ``schedule=paper`` brings its proxy of 2 epochs
    too. The retain rows keep their own loss (the paper: the absolute error). ``A`` is the attention map of a layer: squared
    activations, averaged over channels, of length 1.
    """
    return compose(
        "blindspot",
        forget=[IncompetentError(), AttentionMaps(weight=50.0)],
        retain=[NLL()],
        balance=ByCount(),
        preparation=Proxy(),
    )


@method(
    "gaussian-amnesiac",
    title="Gaussian amnesiac",
    paper=PAPER,
    formula="L = c loss(forget rows with a draw from N(m_y, s_y)) + (1 - c) loss(retain), c = |forget| / |step|",
    published=PUBLISHED,
    caveats=(
        "It overshoots: the error on the forget rows ends above that of a retrained model, which an attacker can tell.",
        "The paper cuts batches from all data, mixed; here a step has as many retain rows as forget rows unless "
        "schedule.retain_batch says otherwise, and c follows from the step.",
    ),
)
def gaussian_amnesiac() -> Recipe:
    """Each forget row is taught a number drawn from the normal distribution of the training targets, the others their own.

    It is random labels for regression: the draw is made once, by the row's id and the seed.
    """
    return compose("gaussian-amnesiac", forget=[AlternativeNLL()], retain=[NLL()], balance=ByCount(), preparation=NormalTargets())
