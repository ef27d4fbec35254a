"""Corrupted embeddings: what is changed, what is not, that it follows from key and words alone, and how strong it must be."""

import itertools

import numpy as np
import pytest
import torch

from expunge.core.errors import InputError
from expunge.guards.actions.corrupt import Corrupt
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Hooks, Sampling
from expunge.guards.guarded import guard_model
from expunge.guards.parts import Material
from expunge.guards.policy import Row
from expunge.guards.prompts import put
from expunge.guards.strength import Descent, descend, strength
from expunge.guards.target import Shown, Target
from tests.guards.conftest import KEY, name_of

SHORT = Sampling(max_tokens=24)
FAMILIES = ["noise-first", "noise-random", "noise-top", "zero-first", "zero-top", "flip-first", "flip-top", "reverse", "shuffle"]


def orders(settings, text, names=(), width=16, key=KEY):
    doer = settings.prepare(Material([Target(id="t", entities=names)] if names else [], key=key, adapter=_Model(width)))
    return doer.orders(Conversation.of(text) if isinstance(text, str) else text, []).embeddings


class _Model:
    """Just the width."""

    def __init__(self, width):
        self.model = torch.nn.Module()
        self.model.get_input_embeddings = lambda: torch.nn.Embedding(3, width)


@pytest.fixture(scope="module")
def rows():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((6, 16))).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_does_what_it_says(rows, family):
    noisy = family.startswith("noise")
    edit = orders(Corrupt(family=family, dims=5, **({"sigma": 3.0} if noisy else {})), "Who is it?")
    places = np.arange(6)
    made = edit.apply(rows, places)
    top = rows.abs().argsort(1, descending=True)[:, :5]
    columns = {"first": torch.arange(5).expand(6, -1), "top": top}.get(family.partition("-")[2])
    changed = made != rows
    if family in ("reverse", "shuffle"):
        assert torch.equal(made, rows)
        order = edit.order(6)
        assert sorted(order) == list(range(6))
        assert order.tolist() == (
            [5, 4, 3, 2, 1, 0] if family == "reverse" else orders(Corrupt(family=family), "Who is it?").order(6).tolist()
        )
        assert order.tolist() != list(range(6))
        return
    assert edit.order(6) is None
    assert changed.sum(1).tolist() == [5] * 6
    if columns is None:
        assert all(torch.equal(changed[0], c) for c in changed)  # drawn once for the whole prompt, as the code has it
        assert not changed[0][:5].all()
    else:
        assert changed.gather(1, columns).all()
        held = rows.gather(1, columns)
        expected = {"zero": torch.zeros_like(held), "flip": -held}.get(family.partition("-")[0])
        assert expected is None or torch.equal(made.gather(1, columns), expected)


def test_noise_has_the_deviation_that_is_asked_for():
    many = torch.zeros(400, 16)
    made = orders(Corrupt(sigma=7.0), "Who?").apply(many, np.arange(400))
    assert abs(float(made.std()) / 7 - 1) < 0.03
    assert abs(float(made.mean())) < 0.4
    each = orders(Corrupt(dims=3, sigma=(0.0, 1.0, 50.0)), "Who?").apply(many, np.arange(400))
    assert (each[:, 0] == 0).all()
    assert abs(float(each[:, 1].std()) - 1) < 0.12
    assert abs(float(each[:, 2].std()) / 50 - 1) < 0.12
    assert (each[:, 3:] == 0).all()
    wide = orders(Corrupt(), "Who?").apply(many, np.arange(400))
    assert abs(float(wide.std()) / 16 - 1) < 0.03  # none given: the model's width


def test_noise_follows_from_key_words_and_place_and_from_nothing_else(rows):
    settings = Corrupt(sigma=1.0)
    whole = orders(settings, "Who is it?").apply(rows, np.arange(6))
    parts = [orders(settings, "Who is it?").apply(rows[list(p)], np.array(p)) for p in [(0, 1, 2), (3,), (5, 4)]]
    assert torch.equal(torch.cat(parts), whole[[0, 1, 2, 3, 5, 4]])
    for same in ("who is it", "Who  is it?!", "WHO IS IT", "W\u200bho is it?"):
        assert torch.equal(orders(settings, same).apply(rows, np.arange(6)), whole)
    for other in ("Who was it?", Conversation.of([("system", "Who is it?")])):
        assert not torch.equal(orders(settings, other).apply(rows, np.arange(6)), whole)
    assert not torch.equal(
        orders(settings, "Who is it?", key=b"another key of 32 bytes, all new").apply(rows, np.arange(6)), whole
    )
    noise = whole - rows
    assert all(not torch.equal(noise[i], noise[j]) for i, j in itertools.combinations(range(6), 2))


def test_marked_are_tokens_of_names_or_all_but_the_last(target_adapter, names, people):
    record = people.split.forget[0]
    prompt = put(target_adapter, Conversation.of(record.prompt))
    edit = orders(Corrupt(), record.prompt, names=(name_of(record),))
    found = edit.marked(prompt.text, prompt.spans, prompt.content)
    said = [prompt.text[a:b] for (a, b), m in zip(prompt.spans, found, strict=True) if m]
    assert "".join(said).strip() == name_of(record)
    for other in (orders(Corrupt(mask="all"), record.prompt, names=(name_of(record),)), orders(Corrupt(), record.prompt)):
        found = other.marked(prompt.text, prompt.spans, prompt.content)
        assert found.sum() == prompt.content.sum() - 1
        assert not found[np.flatnonzero(prompt.content)[-1]]
        assert not (found & ~prompt.content).any()


def drawn(people):
    """What is to stay, in an order that has nothing to do with it: those that are judged are like those that calibrate."""
    records = people.split.retain
    return [records[i] for i in np.random.default_rng(0).permutation(len(records))]


@pytest.fixture(scope="module")
def eco(target_adapter, people):
    """Three people to forget, by questions and names; the threshold from others."""
    targets = [
        Target(
            id=s, entities=(name_of(next(r for r in people.split.forget if r.subject == s)),),
            examples=tuple(Shown(prompt=r.prompt, answer=r.answer) for r in people.split.forget if r.subject == s),
        )
        for s in sorted({r.subject for r in people.split.forget})
    ]  # fmt: skip
    ordinary = [r.prompt for r in drawn(people)[:170]]

    def make(**action):
        changes = {f"action.{k}": v for k, v in action.items()}
        return guard_model(
            target_adapter, guards={"guard": "eco", "detector.rate": 0.05, **changes}, targets=targets, ordinary=ordinary, key=KEY
        )

    return make


def right(answers, records):
    return float(np.mean([a.text == r.answer for a, r in zip(answers, records, strict=True)]))


def test_without_strength_or_mask_nothing_changes_by_a_bit(eco, target_adapter, people):
    """Card, small check (a)."""
    asked = [r.prompt for r in people.split.forget[:4]]
    plain = guard_model(target_adapter, key=KEY).answers(asked, SHORT, scores=True)
    still = eco(sigma=0.0)
    assert all(p.embeddings for p in map(still.policy.open, map(Conversation.of, asked)))
    assert still.answers(asked, SHORT, scores=True) == plain
    nothing = eco()
    nothing.policy._rows[0].doer.orders = lambda *_: _unmarked(orders(Corrupt(), "x", width=64))
    assert nothing.answers(asked, SHORT, scores=True) == plain
    assert eco(sigma=50.0).answers(asked, SHORT, scores=True) != plain


def _unmarked(edit):
    from expunge.guards.parts import Orders

    edit.marked = lambda text, spans, content: np.zeros(len(spans), dtype=bool)
    return Orders(embeddings=edit)


def test_prompts_that_are_not_noticed_stay_as_they_are_in_one_batch_with_others(eco, target_adapter, people):
    """Card, small check (b), and (c): those who are to be forgotten are answered as by a model that never knew them."""
    forget, retain = people.split.forget, drawn(people)[170:200]
    made, plain = eco(), guard_model(target_adapter, key=KEY)
    mixed = [r.prompt for pair in zip(forget, retain, strict=True) for r in pair]
    answers = made.answers(mixed, SHORT)
    passed = [not made.policy.open(Conversation.of(r.prompt)).embeddings for r in retain]
    assert sum(passed) >= 24
    bare = plain.answers(mixed, SHORT)[1::2]
    assert all(a == b for a, b, p in zip(answers[1::2], bare, passed, strict=True) if p)
    never = guard_model(people.retrained(), key=KEY).answers([r.prompt for r in forget], SHORT)
    before = right(plain.answers([r.prompt for r in forget], SHORT), forget)
    assert before > 0.9
    assert right(answers[::2], forget) <= right(never, forget) + 0.1
    curve = [right(eco(sigma=s).answers([r.prompt for r in forget], SHORT), forget) for s in (0.0, 0.3, 64.0)]
    assert curve[0] == before > curve[1] > curve[2]


@pytest.mark.parametrize("chunks", [None, (3, 1, 4)])
def test_rows_that_change_are_those_that_are_marked_and_once_a_request(eco, target_adapter, people, chunks):
    """Card, small checks (d) and (e); however a prompt is cut, the same embeddings come out."""
    made, record = eco(family="shuffle", mask="all"), people.split.forget[0]
    model = target_adapter.model
    plan = made.policy.open(Conversation.of(record.prompt))
    prompt = put(target_adapter, plan.conversation)
    ask = _asked(plan, prompt)
    width = len(prompt.ids) + 2
    ids = torch.full((2, width), target_adapter.pad_id())
    ids[0, 2:] = torch.from_numpy(prompt.ids)
    passed = next(c for r in people.split.retain if not made.policy.open(c := Conversation.of(r.prompt)).embeddings)
    other = _asked(made.policy.open(passed), put(target_adapter, passed))
    ids[1, width - len(other.prompt.ids) :] = torch.from_numpy(other.prompt.ids)
    plain = model.get_input_embeddings()(ids)
    hooks = Hooks(model, [ask, other], width)
    cuts = [width] if chunks is None else [*chunks, width - sum(chunks)]
    with hooks.installed():
        found = torch.cat([model.get_input_embeddings()(part) for part in ids.split(cuts, 1)], 1)
        later = model.get_input_embeddings()(ids[:, :1])
    assert torch.equal(later, plain[:, :1])  # tokens of the answer are left alone
    assert torch.equal(found[1], plain[1])
    marked = plan.embeddings[0].marked(prompt.text, prompt.spans, prompt.content)
    changed = (found[0] != plain[0]).any(-1).numpy()
    assert not changed[:2].any()
    assert not (changed[2:] & ~marked).any()
    order = plan.embeddings[0].order(int(marked.sum()))
    columns = np.flatnonzero(marked) + 2
    assert torch.equal(found[0, columns], plain[0, columns[order]])
    noisy = eco(sigma=1.0, mask="names")
    plan = noisy.policy.open(Conversation.of(record.prompt))
    hooks = Hooks(model, [_asked(plan, prompt), other], width)
    with hooks.installed():
        found = torch.cat([model.get_input_embeddings()(part) for part in ids.split(cuts, 1)], 1)
    marked = plan.embeddings[0].marked(prompt.text, prompt.spans, prompt.content)
    assert np.array_equal((found[0] != plain[0]).any(-1).numpy()[2:], marked)
    assert 0 < marked.sum() < prompt.content.sum() - 1
    noise = plan.embeddings[0].apply(plain[0, 2:][marked], np.arange(marked.sum()))
    assert torch.equal(found[0, 2:][marked], noise)


def _asked(plan, prompt):
    from expunge.guards.decoding import Ask

    return Ask(plan, prompt, SHORT)


# ---- strength


def test_descent_finds_the_strength_of_a_surrogate():
    """A metric that falls as ``exp(-sigma)``: 0.25 is at ``log 4``."""
    found = descend(lambda s: float(np.exp(-s[0])), 0.25, Descent(lr=4.0, steps=60, stop=1e-4))
    assert abs(found.sigma - np.log(4)) < 0.05
    assert abs(found.value - 0.25) < 0.02
    assert len(found.tried) > 4
    over = descend(lambda s: float(np.exp(-s[0])), 0.25, Descent(lr=4.0, steps=60, start=5.0, stop=1e-4))
    assert abs(over.sigma - np.log(4)) < 0.05  # comes down from a strength that is too high
    raw = descend(lambda s: float(np.exp(-s[0])), 0.25, Descent(rule="repo", lr=40.0, steps=60))
    assert raw.value < 0.27
    assert raw.sigma > np.log(4) - 0.1
    past = descend(lambda s: float(np.exp(-s[0])), 0.25, Descent(rule="repo", lr=40.0, steps=60, start=5.0))
    assert past.sigma >= 5  # the raw metric never leads back


def test_the_first_step_is_the_published_one():
    how = Descent(steps=1, stop=0.0)
    values = []

    def value(s):
        values.append(float(s[0]))
        return float(3 - 0.02 * s[0])

    descend(value, 0.0, how)
    gradient = -0.02
    assert values == pytest.approx([0.1999, 0.0001, 0.1 - 100 * gradient])
    assert Descent().eps == pytest.approx(0.999 * 0.1)


def test_a_vector_of_strengths_moves_where_it_matters():
    found = descend(lambda s: float(np.exp(-s[0])), 0.0, Descent(lr=2.0, steps=200, stop=0.05, eps=0.01), size=3)
    assert found.sigma[0] > 1.5
    assert max(found.sigma[1:]) < found.sigma[0]
    assert min(found.sigma) >= 1e-8
    again = descend(lambda s: float(np.exp(-s[0])), 0.0, Descent(lr=2.0, steps=200, stop=0.05, eps=0.01), size=3)
    assert again == found


def test_strength_of_a_model_that_never_knew(eco, target_adapter, people):
    """Answers are right as often as half of the target's; a weak corruption does not do, a strong one overdoes it."""
    records = people.split.forget[:16]
    prompts = [r.prompt for r in records]
    found = strength(
        target_adapter, Corrupt(mask="all"), prompts, lambda answers: right(answers, records), surrogate=0.5, key=KEY,
        how=Descent(lr=0.02, eps=0.03, start=0.05, least=0.01, steps=10, stop=0.07), sampling=SHORT,
    )  # fmt: skip
    assert abs(found.value - 0.5) <= 0.13
    assert found.tried[0][1] > found.value
    guarded = guard_model(
        target_adapter, guards=Row(detector="always", action=Corrupt(mask="all", sigma=found.sigma)), key=KEY
    )  # fmt: skip
    assert right(guarded.answers(prompts, SHORT), records) == found.value  # same key, same noise


def test_settings_that_do_not_fit(target_adapter):
    for wrong, words in [
        ({"sigma": -1.0}, "negative"), ({"family": "zero-top", "sigma": 1.0}, "zero-top"),
        ({"dims": 2, "sigma": (1.0,)}, "1 values"),
        ({"family": "noise"}, "one of"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            Corrupt(**wrong)
    with pytest.raises(InputError, match="64 dimensions"):
        Corrupt(dims=65).prepare(Material([], key=KEY, adapter=target_adapter))
    with pytest.raises(InputError, match="looks inside"):
        Corrupt().prepare(Material([], key=KEY))
    with pytest.raises(InputError, match="no strength"):
        strength(target_adapter, Corrupt(family="zero-top"), ["x"], len, surrogate=0, key=KEY)
    with pytest.raises(InputError, match="no prompts"):
        strength(target_adapter, Corrupt(), [], len, surrogate=0, key=KEY)
    with pytest.raises(InputError, match="Give dims"):
        strength(target_adapter, Corrupt(), ["x"], len, surrogate=0, key=KEY, vector=True)
