"""CodeEraser: what stands in marked spans (secrets in code) goes, what stands around it stays."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Turns
from expunge.methods.compose import compose
from expunge.methods.registry import method
from expunge.methods.terms.distribution import KL, KLAscent
from expunge.methods.terms.likelihood import ForgetNLL, GradientAscent

GAMMA, LAMBDA, ALPHA = 0.5, 0.1, 1.0

PUBLISHED = Turns(
    lr=3e-6, epochs=100, erase_epochs=100, batch=32, second_moment=0.98, weight_decay=0, warmup=0, decay="constant", clip=None
)


@method(
    "codeeraser",
    title="CodeEraser: selective forgetting of secrets in code",
    paper=Paper(
        "Scrub It Out! Erasing Sensitive Memorization in Code Language Models via Machine Unlearning",
        "Zhaoyang Chu, Yao Wan, Zhikun Zhang, Di Wang, Zhou Yang, Hongyu Zhang, Pan Zhou, Xuanhua Shi, Hai Jin, David Lo",
        2025,
        "https://arxiv.org/abs/2509.13755",
    ),
    formula="L = -NLL(marked) + gamma NLL(unmarked) + lambda (-KL(p_ref || p)(marked) + alpha KL(p_ref || p)(retain)); "
    "gamma 0.5, lambda 0.1, alpha 1",
    published=PUBLISHED,
    with_paper={"control": {"name": "memorisation", "ma": 0.4557, "el": 0.0549}},
    caveats=(
        "It reads spans: a column 'spans' in the data, spans.patterns, spans.terms or spans.secrets (see the page on secrets).",
        "The paper takes records whose secret is memorised (accuracy of 0.9 and more); here all that are given are used.",
        "The ascent has no lower bound: the schedule or a control must end it.",
        "The forget side reads the reference's logits: a second copy in memory, unless on a LoRA.",
    ),
)
def codeeraser() -> Recipe:
    """Ascent on the marked tokens alone, descent on those around them, and a divergence that is raised on the former and held low
    on the retain set.

    Each likelihood is a mean over its own tokens, so a short secret weighs as much as the long file that holds it. The divergence
    is that of the authors' code, ``KL(p_ref || p)``; the paper writes its arguments the other way round. gamma is 0.5 as in the
    paper; the code's default and command lines have 0.1 (``forget.forget-nll.weight=0.1``).

    The code divides both divergences by the number of sequences, not of tokens, so the retain side is stronger there by the
    length of its texts (128 tokens): ``forget.kl-ascent.reduction=sum retain.reduction=sum``. It also counts padding in the
    mean of the context, which makes gamma smaller the more a batch is padded; that is left out here.

    Published schedule: in turns, a step on the forget records (32) and one on the retain records, at a constant rate, until
    memorisation accuracy and extraction likelihood of the secrets are below those of unseen code (``control=memorisation``,
    checked after each turn; at most 100 turns, a limit of ours). The thresholds MA and EL_10 of the paper are, for
    CodeParrot-small, the defaults of ``schedule=paper``, 0.4557 and 0.0549; CodeParrot 0.4634 and 0.0514; CodeGen-350M 0.4879
    and 0.0592; CodeGen-2B 0.5361 and 0.0628; Qwen2.5-Coder-7B 0.4099 and 0.0882. For another model have them measured:
    ``control.ma=none control.el=none`` with ``--holdout``. The adaptive schedule ends where the marked tokens cost what they
    cost in unseen text.

    With all tokens marked and gamma 0 it is the constraint-based method that the paper compares with; with lambda 0 too, gradient
    ascent.
    """
    return compose(
        "codeeraser",
        forget=[
            GradientAscent(targets="marked"),
            ForgetNLL(targets="unmarked", weight=GAMMA),
            KLAscent(targets="marked", weight=LAMBDA),
        ],
        retain=[KL(weight=LAMBDA * ALPHA)],
    )
