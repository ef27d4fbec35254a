"""Matching: be trained to say what a model says that never saw the forget set, or what it is predicted to say."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.datamodels import Datamodels
from expunge.methods.registry import method
from expunge.methods.terms.matching import ForgetMatching, RetainMatching

PAPER = Paper(
    "Attribute-to-Delete: Machine Unlearning via Datamodel Matching",
    "Kristian Georgiev, Roy Rinberg, Sung Min Park, Shivam Garg, Andrew Ilyas, Aleksander Madry, Seth Neel",
    2024,
    "https://arxiv.org/abs/2410.23232",
)
_ORACLE = Fixed(lr=1e-3, epochs=10, batch=85, retain_batch=427, warmup=0, decay="constant", weight_decay=0, clip=None)


@method(
    "oracle-matching",
    title="Oracle matching",
    paper=PAPER,
    formula="L = 1/6 ||z - z_oracle||^2 (forget) + 5/6 ||z - z_oracle||^2 (retain)",
    published=_ORACLE,
    caveats=("It needs a model trained without the forget set, so it shows what matching can reach and is no way to forget.",),
)
def oracle_matching() -> Recipe:
    """Fine-tune towards the scores of one model that was trained without the forget set, on forget and retain rows.

    The published loss is the mean over batches of 512 drawn from the forget set and five times as many retain rows: so the
    weights 1/6 and 5/6, and 85 and 427 rows a step. There the retain rows are a fixed random subset; here all of them are drawn
    from in turn. An epoch is a pass over the forget set.
    """
    return compose(
        "oracle-matching", forget=[ForgetMatching(weight=1 / 6)], retain=[RetainMatching(weight=5 / 6)], schedule=_ORACLE
    )


_DATAMODEL = Fixed(lr=1e-4, epochs=20, batch=102, retain_batch=410, warmup=0, decay="constant", weight_decay=0, clip=None)


@method(
    "dmm",
    title="Datamodel matching",
    paper=PAPER,
    formula="L = 1/5 ||z - zhat||^2 (forget) + 4/5 ||z - zhat||^2 (retain), zhat = z_ref - sum_{i in forget} beta_i",
    published=_DATAMODEL,
    caveats=(
        "It trains many models (1,000 by default) on parts of all rows first: meant for models that are small or asked often.",
        "The predictions are noisy where the forget rows are not far fewer than the models: see preparation=datamodels.",
    ),
)
def dmm() -> Recipe:
    """Fine-tune towards the scores that a retrained model is predicted to give, on forget rows and a subset of the retain rows.

    The prediction takes the effect of every forget row, estimated from models of random parts of the data, off the target's
    scores. The published loss is the mean over batches of 512 of the forget set, five times repeated, and of twenty times as
    many retain rows, for four epochs: so the weights 1/5 and 4/5, 102 and 410 rows a step, and 20 passes over the forget set.
    The source of the method is not public; settings are those of its configuration files. With an oracle's own scores it is
    ``oracle-matching``.
    """
    return compose(
        "dmm",
        forget=[ForgetMatching(weight=1 / 5)],
        retain=[RetainMatching(weight=4 / 5)],
        preparation=Datamodels(),
        schedule=_DATAMODEL,
    )
