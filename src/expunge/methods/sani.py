"""SANI: reset units of the last feed-forward layer, then repair without ever teaching a sensitive token."""

from expunge.engine.parameters import Reset
from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.corpus import Corpus
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL


@method(
    "sani",
    title="SANI: sanitising by reset and repair",
    paper=Paper(
        "Leverage Unlearning to Sanitize LLMs", "Antoine Boutet, Lucas Magnana", 2025, "https://arxiv.org/abs/2510.21322"
    ),
    formula="reset 50% of the units of the last feed-forward layer; then L = NLL(unmarked targets of all records)",
    published=Fixed(lr=5e-5, epochs=2, batch=8, warmup=0, decay="linear", weight_decay=0),
    caveats=(
        "It reads spans: the sensitive terms of all records (spans.terms, spans.file), or a column 'spans' in the data.",
        "That what is to go lies in the last layer is an assumption of the paper: look at relearning before you rely on it.",
        "A term that is not marked everywhere is taught again where it is not.",
        "Half of the units of the last block are not where a model of two blocks keeps a secret: it needs parameters.share=1 "
        "parameters.layers=[-1,-2].",
        "The published rate is for BERT-base and GPT-2: on a small model it does not repair.",
    ),
)
def sani() -> Recipe:
    """Half of the units of the last block's feed-forward layer are drawn anew; then the model is trained on all records, the
    forget records among them, with no marked token as a target. Marked tokens stay in the context of others.

    Which weights belong to a unit is not said in what is public of the paper: here its row in the first matrix (with gates: in
    both), its bias, and its column in the output matrix. ``parameters.share`` and ``parameters.layers`` choose others. The
    paper treats masked language models as well, where a sensitive token is never masked; these are not loaded here. It repeats
    both parts if need be: run it again on its result.
    """
    return compose("sani", retain=[NLL(targets="unmarked")], preparation=Corpus(), parameters=Reset())
