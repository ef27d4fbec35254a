"""Detectors that score: what is noticed, that targets come and go at once, that nothing is held in clear."""

import gc
import pickle
import time

import numpy as np
import pytest
import torch

from expunge.core.errors import InputError, MissingExtra
from expunge.data.people import people, world
from expunge.guards.conversation import Conversation, Message
from expunge.guards.decoding import Sampling
from expunge.guards.detectors.classifier import Classifier
from expunge.guards.detectors.similar import Similar
from expunge.guards.detectors.states import States
from expunge.guards.detectors.tuned import Tuning, tuned
from expunge.guards.encoders import NGrams, Sentences
from expunge.guards.parts import Material
from expunge.guards.policy import Row
from expunge.guards.prompts import put
from expunge.guards.reading import read_states
from expunge.guards.target import Shown, Target
from tests.guards.conftest import KEY, name_of

RECORDS = list(people(60, seed=1, facts=10))


def target_of(person, paraphrased=False):
    records = RECORDS[10 * person : 10 * person + 10]
    asked = [r.question_paraphrase if paraphrased else r.prompt for r in records]
    return Target(
        id=f"t{person}", entities=(name_of(records[0]),),
        examples=tuple(Shown(prompt=q, answer=r.answer) for q, r in zip(asked, records, strict=True)),
    )  # fmt: skip


TARGETS = [target_of(i) for i in range(4)]
_POOL = [*[r.prompt for r in RECORDS[100:]], *[r.prompt for r in world()]]  # other people, and countries
_DRAWN = np.random.default_rng(0).permutation(len(_POOL))
ORDINARY, FRESH = ([_POOL[i] for i in part] for part in (_DRAWN[:340], _DRAWN[340:]))  # exchangeable


def material(**changed):
    return Material(**{"targets": TARGETS, "ordinary": ORDINARY, "key": KEY, "seed": 2, **changed})


def fired(watcher, text):
    return [h.target for h in watcher.request(Conversation.of(text))]


@pytest.fixture(scope="module")
def similar():
    return Similar(rate=0.05).fit(material())


def test_paraphrased_questions_are_noticed_and_ordinary_ones_pass_at_the_promised_rate(similar):
    asked = [(i, r.question_paraphrase) for i in range(4) for r in RECORDS[10 * i : 10 * i + 10]]
    found = [fired(similar, q) for _, q in asked]
    assert np.mean([f[:1] == [f"t{i}"] for (i, _), f in zip(asked, found, strict=True)]) > 0.7
    assert np.mean([bool(fired(similar, q)) for q in FRESH]) <= similar.bound.upper(0.999)


def test_scores_are_cosines_of_the_nearest_question(similar):
    """Against dense products of the encoder's own vectors."""
    text = RECORDS[3].question_paraphrase
    vectors = similar.encoder.encode([text, *[q for t in TARGETS for q in t.questions]]).toarray()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    brute = (vectors[1:] @ vectors[0]).reshape(4, 10).max(1)
    scores = similar.scores(Conversation.of(text))
    assert np.allclose([scores[f"t{i}"] for i in range(4)], brute)
    again = similar.scores(Conversation.of(TARGETS[2].questions[5]))
    assert np.isclose(again["t2"], 1)
    assert max(again, key=again.get) == "t2"


def test_ngrams_are_those_of_scikit_learn():
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = ["who was the mayor of essen in may", "the mayor was ill", "of what was he ill", "a rare word"]
    ours = NGrams(KEY, texts, pairs=False, shortest=3, longest=4)
    vectors = ours.encode(texts).toarray()
    words_alone = TfidfVectorizer(token_pattern=r"\w+").fit(texts)
    own = NGrams(KEY, texts, pairs=False, shortest=60, longest=60)
    theirs = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit_transform(texts).toarray()
    assert np.allclose((own.encode(texts) @ own.encode(texts).T).toarray(), theirs @ theirs.T)
    assert len(words_alone.vocabulary_) > 0
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


@pytest.mark.parametrize("way", ["turns", "joined", "among", "base64", "cased"])
def test_a_question_is_noticed_wherever_it_stands(similar, way):
    import base64

    question = TARGETS[1].questions[0]
    half = len(question) // 2
    asked = {
        "turns": Conversation((Message("user", question), Message("assistant", "Hm."), Message("user", "Do say."))),
        "joined": Conversation((Message("user", question[:half]), Message("user", question[half:]))),
        "among": Conversation.of(f"I have walked all day and now I sit by the sea. {question} Also tell me how to bake bread."),
        "base64": Conversation.of("Decode and answer: " + base64.b64encode(question.encode()).decode()),
        "cased": Conversation.of(question.upper().replace("A", "\u0410")),
    }[way]
    assert "t1" in [h.target for h in similar.request(asked)]


def test_targets_come_and_go_at_once():
    watcher = Similar(rate=0.05).fit(material(targets=[]))
    question = TARGETS[0].questions[0]
    assert not fired(watcher, question)
    watcher.add(TARGETS[0])
    assert fired(watcher, question) == ["t0"]
    low = watcher.bound.value
    watcher.add(target_of(12))  # those like the ordinary prompts: the threshold rises with them
    watcher.add(target_of(11))
    assert watcher.bound.value > low
    watcher.drop("t12")
    watcher.drop("t11")
    assert watcher.bound.value == low
    watcher.drop("t0")
    assert not fired(watcher, question)


def test_the_cost_of_a_request_hardly_grows_with_the_targets():
    """1,000 targets of five questions each beside ten."""
    records = list(people(1000, seed=5, facts=5))
    many = [
        Target(id=f"m{i}", examples=tuple(Shown(prompt=r.prompt) for r in records[5 * i : 5 * i + 5])) for i in range(1000)
    ]  # fmt: skip
    taken_by = {q for t in many for q in t.questions}
    others = [o for o in ORDINARY if o not in taken_by]
    seconds = {}
    for n in (10, 1000):
        watcher = Similar(rate=0.05).fit(material(targets=many[:n], ordinary=others))
        asked = [Conversation.of(q) for q in FRESH[:60]]
        watcher.request(asked[0])
        taken = []
        for conversation in asked:
            began = time.process_time()
            watcher.request(conversation)
            taken.append(time.process_time() - began)
        seconds[n] = float(np.median(taken))
    assert seconds[1000] < seconds[10] + 0.015, seconds


def test_no_question_is_held_in_clear(similar):
    gc.collect()
    held = pickle.dumps([similar._rows, similar._held.columns, similar.encoder, similar._calibrating]).lower()
    for word in {w for t in TARGETS for q in t.questions for w in q.lower().split() if len(w) > 4}:
        assert word.encode() not in held


def test_an_encoder_of_transformers_is_the_mean_of_its_last_states(bert):
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    texts = [FRESH[0], "A much longer text, so that the others are padded, and the padding must not count at all.", FRESH[1]]
    found = Sentences(str(bert)).encode(texts).toarray()
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        assert np.allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


def test_likeness_by_a_sentence_encoder(bert):
    watcher = Similar(rate=0.05, encoder=str(bert)).fit(material())
    assert fired(watcher, TARGETS[2].questions[4])[0] == "t2"
    assert np.mean([bool(fired(watcher, q)) for q in FRESH]) <= watcher.bound.upper(0.999)
    watcher.drop("t2")
    assert "t2" not in fired(watcher, TARGETS[2].questions[4])


def test_a_sentence_encoder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no sentence encoder"):
        Sentences(str(tmp_path))
    (tmp_path / "modules.json").write_text("[]")
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match="encoders"):
            Sentences(str(tmp_path))


def test_the_regression_notices_paraphrases_and_keeps_the_promised_rate():
    watcher = Classifier(rate=0.05).fit(material())
    asked = [r.question_paraphrase for i in range(4) for r in RECORDS[10 * i : 10 * i + 10]]
    assert np.mean([bool(fired(watcher, q)) for q in asked]) > 0.8
    assert np.mean([bool(fired(watcher, q)) for q in FRESH]) <= watcher.bound.upper(0.999)
    fixed = Classifier(threshold=0.5).fit(material(ordinary=ORDINARY[:60]))  # no promise: all are learnt from
    assert np.mean([bool(fired(fixed, q)) for q in asked]) > 0.8
    assert len(fixed.learner._ordinary.indptr) == 61


def test_the_regression_learns_targets_that_come_and_forgets_those_that_go():
    watcher = Classifier(rate=0.05).fit(material(targets=TARGETS[:1]))
    question = TARGETS[3].questions[0]
    assert not fired(watcher, question)
    watcher.add(TARGETS[3])
    assert fired(watcher, question) == [""]
    watcher.drop("t3")
    assert not fired(watcher, question)
    watcher.drop("t0")
    assert watcher.bound is None
    assert not fired(watcher, TARGETS[0].questions[0])


QUICK = {"epochs": 20, "lr": 3e-3, "dropout": 0.0, "max_length": 48}


def test_a_model_of_transformers_is_fine_tuned_and_loaded_again(bert, tmp_path):
    given = material(targets=TARGETS[:2], ordinary=ORDINARY[:120])
    watcher = Classifier(rate=0.05, model=str(bert), tuning=QUICK).fit(given)
    asked = [q for t in TARGETS[:2] for q in t.questions]
    assert np.mean([bool(fired(watcher, q)) for q in asked]) > 0.9
    others = np.mean([bool(fired(watcher, q)) for q in FRESH[:100]])
    assert others < 0.3
    model, bound = watcher._held
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = Classifier(rate=0.05, model=str(tmp_path), tune=False, tuning=QUICK).fit(given)
    assert np.allclose(again.model(asked), model(asked), atol=1e-6)
    assert np.isclose(again.bound.value, bound.value)
    with pytest.raises(InputError, match="elsewhere"):
        again.add(TARGETS[2])
    with pytest.raises(InputError, match="no classifier"):
        Classifier(rate=0.05, model=str(tmp_path / "none")).fit(given)


def test_fine_tuning_keeps_the_pass_with_the_fewest_missed(bert):
    """Against the count after each pass, for a rate so high that passes differ."""
    missed = []
    asked = TARGETS[0].questions
    how = Tuning(**{**QUICK, "lr": 1e-2, "epochs": 9})
    model = tuned(str(bert), asked, ORDINARY[:60], how, report=lambda _, n: missed.append(n))
    assert len(missed) == 9
    assert int((model(asked) < how.check).sum()) == min(missed)


def test_states_tell_targets_from_others(people, target_adapter):
    """Of a model that knows all of them; other people set the threshold and others are judged."""
    records = [r for r in people.split.retain if r.subject[-4:] < "0020"]
    fresh = [r.prompt for r in people.split.retain if r.subject[-4:] >= "0020"]
    targets = [
        Target(id=s, examples=tuple(Shown(prompt=r.prompt, answer=r.answer) for r in people.split.forget if r.subject == s))
        for s in sorted({r.subject for r in people.split.forget})
    ]
    given = material(
        targets=targets, ordinary=[*[r.prompt for r in records], *[r.prompt for r in world()]], adapter=target_adapter
    )
    watcher = States(rate=0.1).fit(given)
    assert watcher.readings[0].module == target_adapter.layers()[(len(target_adapter.layers()) - 1) // 2]

    def noticed(prompts):
        read = read_states(target_adapter, [put(target_adapter, Conversation.of(p)) for p in prompts], watcher.readings)
        return np.array([bool(watcher.hidden(s)) for s in read])

    asked = [r.question_paraphrase for r in people.split.forget]
    assert noticed(asked).mean() > 0.8
    assert noticed(fresh).mean() < 0.4
    first = [r.question_paraphrase for r in people.split.forget if r.subject == targets[0].id]
    before = noticed(first).mean()
    watcher.drop(targets[0].id)
    assert noticed(first).mean() < before - 0.4
    watcher.add(targets[0])
    assert noticed(first).mean() == before


def test_states_are_those_of_the_answers_own_run(guarded, people):
    """What is fitted on is what is seen when a request is answered, in a padded batch."""
    row = Row(detector=States(rate=0.1, steps=1), action="refuse")
    made = guarded([row], targets=TARGETS[:2], ordinary=[r.prompt for r in people.split.retain])
    watcher = made.policy._rows[0].watcher
    seen = []
    watcher.hidden = lambda states: seen.append(states[watcher.readings[0]]) or []
    asked = [r.prompt for r in people.split.forget[:5]]
    made.answers(asked, Sampling(max_tokens=2))
    assert torch.allclose(torch.stack(seen), watcher._read(asked), atol=1e-5)


def test_a_target_that_no_guard_can_notice_is_refused(guarded):
    made = guarded([Row(detector="terms", action="refuse"), Row(detector=Similar(rate=0.05), action="refuse")], ordinary=ORDINARY)
    assert set(made.policy.promises) == {"similar+refuse"} or made.policy.promises == {}
    with pytest.raises(InputError, match="No guard here can notice"):
        made.add({"skills": ["chess"]})
    made.add({"topics": ["The rules of chess"]})
    assert "ordinary prompts" in made.policy.promises["similar+refuse"]
    made.add({"entities": ["Basil Mahfouz"]})
    with pytest.raises(InputError, match="1 topic"):
        guarded("filter", targets=[Target(id="t", topics=("Chess",))])


def test_people_of_whom_nothing_was_learnt_pass_where_prompts_come_in_groups():
    """Thirty people, ten questions each; judged by twenty others. Without groups the threshold is that of people it knows."""
    known = RECORDS[100:400]
    others = [r.prompt for r in RECORDS[400:]]
    noticed = []
    for groups in ([], [r.subject for r in known]):
        watcher = Classifier(rate=0.05).fit(material(ordinary=[r.prompt for r in known], groups=groups))
        noticed.append(np.mean([bool(fired(watcher, q)) for q in others]))
    assert noticed[1] < 0.12 < noticed[0], noticed
