"""Oracle matching: be trained to say what a model says that never saw the forget set."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
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
