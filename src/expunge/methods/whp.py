"""Who's Harry Potter: fine-tuning on generic labels, and the subtraction of logits that benchmarks call by the same name."""

from expunge.engine.finish import Subtract
from expunge.engine.parameters import Twin
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.generic import GenericLabels
from expunge.methods.registry import method
from expunge.methods.terms.generic import GenericNLL
from expunge.methods.terms.likelihood import ForgetNLL

WHP = Paper(
    "Who's Harry Potter? Approximate Unlearning in LLMs",
    "Ronen Eldan, Mark Russinovich",
    2023,
    "https://arxiv.org/abs/2310.02238",
)


@method(
    "whp",
    title="Who's Harry Potter: generic labels",
    paper=WHP,
    formula="L = -mean_tokens log p(label | text), label = argmax_v [v - alpha relu(v_reinforced - v)], v in the translated text",
    published=Fixed(lr=1e-6, epochs=2, batch=128),
    with_paper={"preparation": {"lr": 3e-6, "epochs": 3, "batch": 128}},
    caveats=(
        "What is said instead depends on the dictionary of anchors; without one names give way to the next best.",
        "No retain data are read: small models lose what they should keep, unless retain=nll is added.",
        "Only the text as it is given is changed: other languages, and knowledge of the whole, are known to leak.",
        "A model that knows the text by heart shows little of it in 10 epochs: see the notes, and raise preparation.epochs.",
        "Rates, epochs and batch are recalled from the paper, whose code is not public.",
    ),
)
def whp() -> Recipe:
    """Teach the forget text with the labels of a model that had not read it.

    A copy is trained further on the forget text; what it finds likelier than the target does is pushed down by ``alpha``, and
    only that: without the ``relu``, tokens that the copy dislikes would be promoted. Names are taken out of the context by a
    dictionary of anchors (``preparation.anchors=FILE``). There is no official code; where the paper leaves a choice (tokens
    within a term, repeated mentions), the preparation says which is made and offers the other.
    """
    return compose("whp", forget=[GenericNLL()], preparation=GenericLabels())


@method(
    "whp-logits",
    title="WHP-logits: reinforced scores subtracted",
    paper=WHP,
    formula="result: v - scale relu(v_reinforced - v); v_reinforced of a copy trained on NLL(forget)",
    published=Fixed(lr=1e-5, epochs=3, batch=32),
    with_paper={"finish": {"scale": 1.0}},
    caveats=(
        "This is not the paper's method: no dictionary, no fine-tuning; two whole models run for every token.",
        "The target's weights are untouched and part of the result: who has them can ask the target itself.",
    ),
)
def whp_logits() -> Recipe:
    """The generic scores of Who's Harry Potter as they are, from the target and a reinforced copy at inference.

    The MUSE benchmark's baseline of that name, with its strength of 1 for ``schedule=paper`` (the paper's alpha is 5); otherwise
    the schedule finds it. How long its copy was trained is not said with the code; the published schedule here is that of
    MUSE's other fine-tuned baselines, cut to 3 epochs.
    """
    return compose(
        "whp-logits", forget=[ForgetNLL()], parameters=Twin(), finish=Subtract(link="relu", against="target", centred=False)
    )
