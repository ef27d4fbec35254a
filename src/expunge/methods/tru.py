"""TRU: reasons and refusals as targets, beside gradient difference."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL, AlternativeNLL, GradientAscent


@method(
    "tru",
    title="Targeted reasoning unlearning",
    paper=Paper(
        "Explainable LLM Unlearning Through Reasoning",
        "Junfeng Liao, Qizhou Wang, Shanshan Ye, Xin Yu, Ling Chen, Zhen Fang",
        2026,
        "https://arxiv.org/abs/2603.09980",
    ),
    formula="L = NLL(reason, refusal | forget question) + alpha (-NLL(forget) + lambda NLL(retain))",
    published=Fixed(),
    alternatives="reasons",
    caveats=(
        "Neither alpha and lambda nor a schedule are published: the weights here are ours, the schedule is that of TOFU.",
        "A model that says why it refuses tells that there was something to forget.",
        "Without the reasons it refuses more than it should (the paper's ablation).",
    ),
)
def tru() -> Recipe:
    """Teach, for each forget question, a chain of reasons that ends in a refusal; push the old answer down; keep the retain set.

    The target is one answer, the reasons and then the refusal, so ``NLL(reason | x) + NLL(refusal | reason, x)`` is its
    likelihood. It may be supplied (a column ``alternatives``), made by a rule (``reasons``, the default, or a template of yours
    with ``{subject}``, ``{prompt}`` and ``{refusal}``), or written by a model (``preparation=written-answers
    preparation.task=TASK preparation.model=MODEL``; the paper has it written by a large reasoning model). The other part is
    ``graddiff``.

    Reasons are long: the likelihoods are means over tokens, since sums would drown the ascent. The ascent has no lower
    bound and the target term has one, so alpha is small here (0.03, with a retain weight of 1). Without the ascent the old
    answer stays likely behind a forced beginning; without the target the model answers nothing that can be read.
    """
    return compose(
        "tru",
        forget=[AlternativeNLL(), GradientAscent(weight=0.03)],
        retain=[NLL()],
    )
