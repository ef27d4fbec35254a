"""Label-agnostic forgetting: features of forget rows leave their place, and no label is read."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Alternate
from expunge.methods.compose import compose
from expunge.methods.preparations.autoencoders import Autoencoders
from expunge.methods.registry import method
from expunge.methods.terms.unlabelled import LafKeep, LafLeave, LafPart, LafStay

PUBLISHED = Alternate(
    lr=1e-5,
    groups=(("laf-leave", "laf-keep"), ("laf-part", "laf-stay")),
    rates=(1.0, 4.0),
    epochs=40,
    batch=32,
    weight_decay=0,
    clip=None,
)


@method(
    "laf",
    title="LAF: label-agnostic forgetting",
    paper=Paper(
        "Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models",
        "Shaofei Shen, Chenhao Zhang, Yawen Zhao, Alina Bialkowski, Weitong Tony Chen, Miao Xu",
        2024,
        "https://arxiv.org/abs/2404.00506",
    ),
    formula=(
        "first step: L = mean_retain exp(m_R/(m_R+1)) - mean_forget exp(m_F/(m_F+1)), m = ||h(e) - e||^2; "
        "second step: L = mean_retain d_i - log sum_forget exp(d_j/tau), d = 1 - cos(e, e_ref)"
    ),
    published=PUBLISHED,
    caveats=(
        "The rates belong to networks of the paper's size; a small one may take 100 times larger ones.",
        "Most of the forgetting comes from the second step; the autoencoders alone do little.",
        "The adaptive schedule would look at labels to find its stop; the method's own schedule does not.",
    ),
)
def laf() -> Recipe:
    """Features of forget rows are driven off the target's and out of what an autoencoder of them knows; no label is read.

    The features are those of which the scores are made, so the last layer gets no gradient and keeps its value bit for bit. On
    each pair of batches two steps are taken by two Adam optimisers of the same weights. An epoch is a pass over the forget set.
    The settings are those for a ResNet-18 and random rows; for small networks: ``latent`` 8, 20 epochs, rates 5e-5 and 1e-4,
    ``tau`` 5 or 20. The variant with one epoch on the labels of retain rows, for the last layer alone, is not part of it:
    follow it by ``finetune`` with ``parameters=named``.
    """
    return compose(
        "laf",
        forget=[LafLeave(), LafPart()],
        retain=[LafKeep(), LafStay()],
        preparation=Autoencoders(),
        schedule=PUBLISHED,
    )
