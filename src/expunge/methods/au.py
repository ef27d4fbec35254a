"""AU: adaptive unlearning of names that a model makes up, on what it writes itself."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.controls.rediscovery import Rediscovery
from expunge.methods.preparations.discovery import Discovered
from expunge.methods.registry import method
from expunge.methods.terms.hallucinated import ForgetKL, Unlikelihood
from expunge.methods.terms.likelihood import ForgetNLL

LAMBDA, MU = 1.0, 0.1

SUGGESTED = Fixed(lr=1e-5, epochs=5, batch=32, warmup=0, decay="constant", weight_decay=0)


@method(
    "au",
    title="Adaptive unlearning of made-up package names",
    paper=Paper(
        "LLM Ghostbusters: Surgical Hallucination Suppression via Adaptive Unlearning",
        "Joseph Spracklen, Pedram Aghazadeh, Farinaz Koushanfar, Murtuza Jadliwala",
        2026,
        "https://arxiv.org/abs/2605.01047",
    ),
    formula="L = NLL(names that exist) + lambda mean -log(1 - p)(made-up names) + mu KL(p_ref || p)(all around them), on "
    "completions by the model itself; lambda 1, mu 0.1",
    published=SUGGESTED,
    caveats=(
        "The forget set and the holdout are prompts; preparation.known or preparation.checker says which names exist.",
        "Only the abstract was at hand: loop, loss and all numbers are a reconstruction, and no schedule is published.",
        "The learning rate is fixed and not found: small models need a larger one (schedule.lr), a LoRA 1e-4.",
        "A name that is on the list because somebody registered it for an attack counts as one that exists.",
    ),
)
def au() -> Recipe:
    """Make the model write, mark the names that do not exist, suppress these and strengthen those that do, and look again.

    Each round draws completions of prompts at a temperature (``preparation=discovery``), finds the package names in them and asks
    a local list whether they exist. Tokens of names that exist are taught, tokens of made-up names are suppressed by
    unlikelihood, whose gradient is bounded, and all other tokens are held by a divergence from the target. After each pass the
    next round begins (``control=rediscovery``): prompts that made the model make names up are kept and mutated, and completed
    by the model as it is now. It ends after 5 rounds, or when the share of made-up names on held-out prompts no longer
    falls. ``control=none`` is a single round that is trained on for all epochs.

    The abstract names a hybrid objective on tokens that reinforces valid outputs and suppresses made-up ones, a loop of
    discovery without supervision, and data of the model alone. What the terms are, that the rest is held by a divergence, and
    all coefficients are ours. A made-up name is suppressed from its first token on that no name that exists shares.

    The mean of each term is over its own tokens. The divergence needs the target's scores: a second copy in memory, unless on a
    LoRA.
    """
    return compose(
        "au",
        forget=[
            ForgetNLL(targets="favoured"),
            Unlikelihood(targets="marked", weight=LAMBDA),
            ForgetKL(targets="unmarked", weight=MU),
        ],
        preparation=Discovered(),
        control=Rediscovery(),
        schedule=SUGGESTED,
    )
