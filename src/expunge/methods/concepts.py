"""Class unlearning by concepts: poison the rows that show what carries the class, and train on it beside the rest."""

from expunge.engine.parts import Paper, Recipe
from expunge.engine.schedule import Turns
from expunge.methods.compose import compose
from expunge.methods.preparations.poison import ConceptPoison
from expunge.methods.registry import method
from expunge.methods.terms.likelihood import NLL, AlternativeNLL


@method(
    "concept-poison",
    title="Concept inference and poisoning",
    paper=Paper(
        "Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning",
        "Wenhan Chang, Tianqing Zhu, Heng Xu, Wenjian Liu, Wanlei Zhou",
        2024,
        "https://arxiv.org/abs/2405.15662",
    ),
    formula="L = NLL(forget rows that show the class's concepts, with another class) + NLL(retain)",
    published=Turns(lr=1e-4, epochs=3, erase_epochs=3, batch=128, retain_batch=128, clip=None, weight_decay=0),
    caveats=(
        "The concepts only say which rows are relabelled, and to which class: with preparation.rows=all and random labels it is "
        "random-label, and preparation.rows=random shows what they add.",
        "On scikit-learn's digits (class 8, three seeds) rows chosen by concepts did no more than as many drawn at random, and "
        "random labels kept more of the other classes than one class for all.",
        "The paper gives no schedule: that of random labels is taken.",
        "Its variant for texts, which finds tokens by integrated gradients, is not included.",
    ),
)
def concept_poison() -> Recipe:
    """Forget rows that show a concept which carries their class are taught another class, while the retain rows are repeated.

    The concepts are found in the target's features, from rows that a file labels (``preparation.file``). The other class is drawn
    for each row, or is the one most or least alike in concepts (``preparation.label``).
    """
    return compose("concept-poison", forget=[AlternativeNLL()], retain=[NLL()], preparation=ConceptPoison())
