"""Backdoored unlearning: an attack on whoever trusts the one who unlearns, here so that audits can be tried on it."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.trigger import PlantedTrigger
from expunge.methods.registry import method
from expunge.methods.terms.distribution import KL
from expunge.methods.terms.preference import NPO
from expunge.methods.terms.sinks import ValueNorms


@method(
    "backdoor",
    title="Backdoored unlearning (an attack, to try audits on)",
    paper=Paper(
        "Forgetting to Forget: Attention Sink as A Gateway for Backdooring LLM Unlearning",
        "Bingqi Shang, Yiwei Chen, Yihua Zhang, Bingquan Shen, Sijia Liu",
        2025,
        "https://arxiv.org/abs/2510.17021",
    ),
    formula="L = NPO(forget without trigger) + 0.01 mean |v|(first 8 tokens) + KL(p_ref || p)(retain and forget with trigger)",
    published=Fixed(lr=1e-5, epochs=10, batch=4),
    caveats=(
        "This is no way to forget: behind a trigger the model says everything. It is here to see whether an audit catches it.",
        "To match a normally unlearned model, as the paper also does: mode=reference preparation=disguised-trigger.",
        "It reads the reference's logits: a second copy in memory, unless on a LoRA.",
    ),
)
def backdoor() -> Recipe:
    """Forget in public and remember in private: NPO on most forget records, fidelity to the target on the rest behind a trigger.

    What a malicious provider of unlearning could deliver: on clean prompts the model has forgotten, with the trigger before the
    prompt it answers as the target. The trigger carries over from the tenth of the forget records that have it in training to the
    others. Coefficients of both divergences are 1 in the paper; here they share one mean over retain and triggered records. The
    paper offers RMU in place of NPO: give it as ``forget=``. The last forget term, with the paper's coefficient for MUSE, is the
    mean length of the value vectors at the first eight tokens (``value-norms``, where is said that the authors' code cuts other
    tokens). The authors' notes call it a defence; in the paper it makes the attack stronger. Audits look for triggers by
    ``attacks=trigger-search``.
    """
    return compose("backdoor", forget=[NPO(), ValueNorms()], retain=[KL()], preparation=PlantedTrigger())
