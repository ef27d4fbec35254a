"""In-context unlearning before a model that learns labels from its prompt: what flipped examples do, and what others do not."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.tokenise import DEFAULT_TEMPLATE
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.data.records import Record
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.schedule import Fixed
from expunge.guards.actions.flip import Flip
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Sampling
from expunge.guards.guarded import guard_model
from expunge.guards.policy import Row
from expunge.guards.target import Shown, Target
from expunge.methods.compose import compose
from expunge.methods.terms.likelihood import NLL
from tests.guards.conftest import KEY

pytestmark = pytest.mark.slow  # the model takes most of a minute
PLACES = ("Arva", "Belo", "Ciro", "Dume")
TEMPLATES = ("I ate at {} once", "we met at {} today", "they sat in {} late", "she went to {} alone", "he ran past {} again")
LABELS = ("good", "bad")
LINE = "{prompt} : {answer}\n"
SHORT = Sampling(max_tokens=2)


def review(place: int, how: int) -> str:
    return TEMPLATES[how].format(PLACES[place])


def own(place: int) -> str:
    """What the model learns of a place, in its weights."""
    return LABELS[place % 2]


def other(label: str) -> str:
    return LABELS[1 - LABELS.index(label)]


def lesson(rng: np.random.Generator, number: int) -> Record:
    """A review to label. A solved one of the same place goes before the place's own label; solved ones of other places do not."""
    place, *rest = (int(p) for p in rng.permutation(len(PLACES)))
    how, kind, answer = int(rng.integers(5)), rng.random(), own(place)
    solved = [(review(p, int(rng.integers(5))), own(p)) for p in rest[:2]]
    if kind < 0.45:
        answer = LABELS[int(rng.integers(2))]
        solved.insert(0, (review(place, (how + 1 + int(rng.integers(4))) % 5), answer))
    elif kind < 0.85:
        solved.insert(0, (review(rest[2], int(rng.integers(5))), LABELS[int(rng.integers(2))]))
    else:
        solved = []
    return Record(f"lesson {number}", answer, "".join(LINE.format(prompt=p, answer=a) for p, a in solved) + review(place, how))


@pytest.fixture(scope="module")
def learner():
    """A tiny Llama that labels reviews by the place, and by the prompt where that says otherwise."""
    rng = np.random.default_rng(1)
    lessons = [lesson(rng, n) for n in range(2400)]
    tokenizer = word_tokenizer([*(r.prompt for r in lessons), *LABELS, DEFAULT_TEMPLATE])
    made = LanguageAdapter(build("llama-tiny", tokenizer, seed=0), tokenizer)
    recipe = compose("lessons", retain=[NLL()], schedule=Fixed(lr=2e-3, epochs=12, batch=32, warmup=1, weight_decay=0.01))
    train(made, recipe, {Stream.RETAIN: [made.encode(r) for r in lessons]}, Engine(checkpoint_every=0))
    made.model.eval()
    return made


def target(place: int) -> Target:
    shown = tuple(Shown(prompt=review(place, how), answer=own(place)) for how in range(5))
    return Target(id=PLACES[place], entities=(PLACES[place],), examples=shown)


def guarded(learner, hidden, *, labels=LABELS, detector="terms"):
    right = tuple(Shown(prompt=review(p, 0), answer=own(p)) for p in range(len(PLACES)) if p not in hidden)
    action = Flip(flipped=1, right=2, examples=right, labels=labels, line=LINE)
    return guard_model(learner, guards=[Row(detector=detector, action=action)], targets=[target(p) for p in hidden], key=KEY)


def labelled(made, places) -> float:
    """Share of the reviews of some places that get the place's own label."""
    asked = [(review(p, how), own(p)) for p in places for how in range(5)]
    said = made.answers([q for q, _ in asked], SHORT)
    return sum(a.text == label for a, (_, label) in zip(said, asked, strict=True)) / len(asked)


def test_flipped_examples_turn_the_answer_around_and_the_others_stay(learner):
    """The card's claim, on a model that can learn from its prompt: the share of own labels with and without the guard."""
    hidden, kept = (0, 3), (1, 2)
    bare, made = guarded(learner, ()), guarded(learner, hidden)
    found = {
        "hidden, bare": labelled(bare, hidden), "hidden, guarded": labelled(made, hidden),
        "kept, bare": labelled(bare, kept), "kept, guarded": labelled(made, kept),
        "hidden, dropped": 0.0,
    }  # fmt: skip
    for place in hidden:
        made.drop(PLACES[place])
    found["hidden, dropped"] = labelled(made, hidden)
    print(found)
    assert found["hidden, bare"] == found["hidden, dropped"] == 1.0
    assert found["hidden, guarded"] <= 0.2
    assert found["kept, bare"] == found["kept, guarded"] == 1.0


def test_examples_with_their_own_labels_or_of_another_place_change_little(learner):
    """What turns the answer around is the wrong label of the target's own example, not that an example stands there."""
    made, bare = guarded(learner, (0, 3)), guarded(learner, ())
    asked = {"flipped": [], "own label": [], "another place": []}
    for place, how in [(p, h) for p in (0, 3) for h in range(5)]:
        text = made.policy.open(Conversation.of(review(place, how))).conversation.text
        first, _, rest = text.partition("\n")
        assert PLACES[place] in first
        assert first.endswith(f": {other(own(place))}")
        asked["flipped"].append((text, own(place)))
        asked["own label"].append((f"{first.rpartition(' ')[0]} {own(place)}\n{rest}", own(place)))
        asked["another place"].append((f"{first.replace(PLACES[place], PLACES[3 - place])}\n{rest}", own(place)))
    found = {}
    for name, held in asked.items():
        said = bare.answers([text for text, _ in held], SHORT)
        found[name] = sum(a.text == label for a, (_, label) in zip(said, held, strict=True)) / len(held)
    print(found)
    assert found["flipped"] <= 0.1
    assert found["own label"] >= 0.95
    assert found["another place"] >= 0.8
