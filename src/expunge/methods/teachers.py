"""Students of two teachers: SCRUB leaves the target on the forget set, Bad Teacher goes to a network that knows nothing."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed, Turns
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.distribution import KL, IncompetentKL, KLAscent
from expunge.methods.terms.likelihood import NLL

SCRUB = Paper(
    "Towards Unbounded Machine Unlearning",
    "Meghdad Kurmanji, Peter Triantafillou, Jamie Hayes, Eleni Triantafillou",
    2023,
    "https://arxiv.org/abs/2302.09880",
)
PUBLISHED = Turns(lr=5e-4, epochs=3, erase_epochs=2, batch=32, retain_batch=128, optimizer="sgd", weight_decay=5e-4, clip=None)


@method(
    "scrub",
    title="SCRUB",
    paper=SCRUB,
    formula="max step: L = -KL_T(p_ref || p)(forget); min step: L = alpha KL_T(p_ref || p)(retain) + gamma NLL(retain)",
    published=PUBLISHED,
    together=("temperature",),
    caveats=(
        "The number of forget steps (forget rows over batch size, times erase_epochs) decides how far it goes.",
        "Where a membership attack is feared, rewind: scrub-rewind, which needs held-out rows.",
    ),
)
def scrub() -> Recipe:
    """The student leaves the target's predictions on the forget set and stays with them on the retain set, in turns.

    Each of the first epochs begins with a pass over the forget set that raises the divergence from the target, and ends with one
    over the retain set that lowers it; the last epochs only repair. alpha 0.001 and gamma 0.99 at temperature 4 are the paper's.
    The step size is searched by a range test unless ``schedule.lr`` is given. With erase_epochs 0 and alpha 0 it is
    fine-tuning.
    """
    return compose(
        "scrub",
        forget=[KLAscent(temperature=4.0)],
        retain=[KL(weight=0.001, temperature=4.0), NLL(weight=0.99)],
        schedule=Turns(lr=None, epochs=3, erase_epochs=2, batch=32, retain_batch=128),
    )


@method(
    "scrub-rewind",
    title="SCRUB with rewinding (SCRUB+R)",
    paper=SCRUB,
    formula="as scrub; then the epoch whose error on the forget set is nearest to the last epoch's on unseen rows of its classes",
    published=PUBLISHED.model_copy(update={"rewind": True}),
    together=("temperature",),
    caveats=(
        "The rows by which it chooses should not be those that an audit judges by.",
        "Of few epochs there is not much to choose from: give schedule.epochs.",
    ),
)
def scrub_rewind() -> Recipe:
    """SCRUB, which keeps the weights of each epoch and goes back to those that err on the forget set as on unseen rows.

    A forget set with a higher error than unseen rows can be told by an attacker as one with a lower can. The reference is the
    error of the last weights on rows that were never trained on and have the classes of the forget set, in its proportions.
    """
    made = scrub.build()
    return made.model_copy(update={"name": "scrub-rewind", "schedule": made.schedule.model_copy(update={"rewind": True})})


@method(
    "bad-teacher",
    title="Bad Teacher",
    paper=Paper(
        "Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an Incompetent Teacher",
        "Vikram S Chundawat, Ayush K Tarun, Murari Mandal, Mohan Kankanhalli",
        2023,
        "https://arxiv.org/abs/2205.08096",
    ),
    formula="L = KL(p_bad || p)(forget) + KL(p_ref || p)(retain)",
    published=Fixed(lr=1e-4, epochs=1, batch=256, warmup=0, decay="constant", weight_decay=0, clip=None),
    caveats=("Forget rows end near uniform predictions, which no model that never saw them makes: an attacker can tell.",),
)
def bad_teacher() -> Recipe:
    """Forget predictions go to those of a random network of the same shape, retain predictions stay the target's.

    The paper mixes both in one batch with a random 30 % of the retain set; here the retain rows of a step are drawn from all of
    it, as many as forget rows unless ``schedule.retain_batch`` says otherwise. The official code divides the divergence by the
    number of classes too, and its learning rate assumes that.
    """
    return compose("bad-teacher", forget=[IncompetentKL()], retain=[KL()])
