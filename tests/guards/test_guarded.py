"""A model with guards: what is refused, what passes untouched, and that no request sees anything of another."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Sampling
from expunge.guards.named import GUARDS, rows_of
from expunge.guards.parts import Action, Detector, Doer, EmbeddingEdit, HiddenEdit, Hit, Hook, Orders, Reading, Watcher
from expunge.guards.policy import SORRY, Row
from tests.guards.conftest import name_of

SHORT = Sampling(max_tokens=24)


def bare_answers(adapter, records, tokens=24):
    return [g.text for g in adapter.generate(adapter.model, [adapter.encode(r) for r in records], tokens)]


def test_the_filter_refuses_those_to_forget_and_leaves_others_as_they_were(guarded, target_adapter, people):
    forget, retain = people.split.forget[:8], people.split.retain[:8]
    made = guarded()
    answers = made.answers([r.prompt for r in [*forget, *retain]], SHORT)
    assert [a.text for a in answers[:8]] == [SORRY] * 8
    assert {a.finish for a in answers[:8]} == {"guard"}
    assert [a.text for a in answers[8:]] == bare_answers(target_adapter, retain)
    assert {a.finish for a in answers[8:]} == {"stop"}


def test_an_answer_that_names_a_target_is_stopped(guarded, people, names):
    """Asked without the name (backwards, from a fact to the person), the model says the name itself."""
    made, plain = guarded(), guarded(targets=[])
    records = people.split.forget
    asked = [Conversation.text_to_continue(f"Question: {r.prompt}\nAnswer:".replace(name_of(r).split()[1], "")) for r in records]
    bare = plain.obeyed([plain.policy.open(c) for c in asked], [SHORT] * len(asked))
    stopped = made.obeyed([made.policy.open(c) for c in asked], [SHORT] * len(asked))
    said = [any(n in a.text for n in names) for a in bare]
    assert sum(said) > 5
    assert [a.finish == "guard" for a in stopped] == said
    assert not any(n in a.text for n in names for a in stopped)


def test_targets_come_and_go_while_it_runs(guarded, people):
    made = guarded(targets=[])
    record = people.split.forget[0]
    before = made.answers([record.prompt], SHORT)[0].text
    name = made.add({"entities": [name_of(record)]})
    assert made.answers([record.prompt], SHORT)[0].text == SORRY
    made.drop(name)
    assert made.answers([record.prompt], SHORT)[0].text == before != SORRY


def test_a_target_that_cannot_be_hidden_changes_nothing(guarded):
    made = guarded()
    held = dict(made.targets)
    digest = made.policy.digest()
    with pytest.raises(InputError, match="empty"):
        made.add({})
    assert dict(made.targets) == held
    assert made.policy.digest() == digest


def test_pieces_of_a_stream_join_to_the_answer(guarded, people):
    made = guarded()
    asked = [r.prompt for r in [*people.split.retain[:4], *people.split.forget[:2]]]
    pieces = [[] for _ in asked]
    answers = made.answers(asked, SHORT, [p.append for p in pieces])
    assert ["".join(p) for p in pieces] == [a.text for a in answers] == [a.text for a in made.answers(asked, SHORT)]
    assert max(map(len, pieces[:4])) > 1


def test_stop_texts_end_an_answer_and_are_not_sent(guarded, people):
    made = guarded(targets=[])
    record = people.split.retain[0]
    whole = made.answers([record.prompt], SHORT)[0].text
    word = whole.split()[2]
    pieces = []
    cut = made.answers([record.prompt], SHORT.model_copy(update={"stop": (f" {word}",)}), [pieces.append])[0]
    assert cut.text == "".join(pieces) == whole[: whole.index(f" {word}")]
    assert cut.finish == "stop"


def test_drawing_depends_on_the_seed_alone_and_not_on_the_batch(guarded, people):
    made = guarded(targets=[])
    asked = [r.prompt for r in people.split.retain[:6]]
    how = [Sampling(max_tokens=12, temperature=2.0, seed=s) for s in range(6)]
    together = [a.text for a in made.answers(asked, how)]
    alone = [made.answers([q], h)[0].text for q, h in zip(asked, how, strict=True)]
    assert together == alone
    assert together != [a.text for a in made.answers(asked, [h.model_copy(update={"seed": 100 + h.seed}) for h in how])]
    tiny = Sampling(max_tokens=12, temperature=2.0, top_p=1e-6, seed=3)
    greedy = Sampling(max_tokens=12)
    assert [a.text for a in made.answers(asked, tiny)] == [a.text for a in made.answers(asked, greedy)]
    assert [a.text for a in made.answers(asked, tiny.model_copy(update={"top_p": 1.0, "top_k": 1}))] == [
        a.text for a in made.answers(asked, greedy)
    ]


def test_log_probabilities_are_those_of_the_model(guarded, target_adapter, people):
    made = guarded(targets=[])
    record = people.split.retain[0]
    answer = made.answers([record.prompt], SHORT, scores=True)[0]
    example = target_adapter.written(target_adapter.encode(record), answer.ids, ended=False)
    batch = target_adapter.collate([example])
    with torch.no_grad():
        losses = target_adapter.forward(target_adapter.model, batch, frozenset({"losses"})).losses
    assert np.allclose(-losses.numpy(), answer.log_probabilities, atol=1e-4)


def test_generate_is_as_transformers_has_it(guarded, target_adapter, people):
    tokenizer, model = target_adapter.tokenizer, target_adapter.model
    records = [*people.split.retain[:3], *people.split.forget[:2]]
    prompts = [target_adapter.encode(r).data for r in records]
    ids = [p.ids[: p.start].tolist() for p in prompts]
    width = max(map(len, ids))
    pad = target_adapter.pad_id()
    batch = torch.tensor([[pad] * (width - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
    theirs = model.generate(
        input_ids=batch, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=pad,
        eos_token_id=sorted(target_adapter.end_ids),
    )  # fmt: skip
    ours = guarded().generate(batch, mask, max_new_tokens=24)
    for row in range(3):
        a, b = (tokenizer.decode(t[row, width:], skip_special_tokens=True).strip() for t in (theirs, ours))
        assert a == b
    assert torch.equal(ours[:, :width], batch)
    assert not torch.equal(theirs[3:, width : width + 5], ours[3:, width : width + 5])


# ---- hooks: each touches its own request alone


class NameDetector(Detector):
    """Fires on requests that hold a word."""

    name: ClassVar[str] = "a-word"
    title: ClassVar[str] = "A word"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST})
    word: str = ""

    def fit(self, material):
        detector = self

        class W(Watcher):
            def request(self, conversation):
                return [Hit("t", 1.0)] if detector.word in conversation.text else []

        return W()


class Zero(EmbeddingEdit):
    def __init__(self, seen):
        self.seen = seen

    def marked(self, text, spans, content):
        return content

    def apply(self, rows, places):
        self.seen.append(len(rows))
        return torch.zeros_like(rows)


SEEN: list[int] = []
BLOCK = "model.layers.0"


class Blank(Action):
    """Zero embeddings or states."""

    name: ClassVar[str] = "blank"
    title: ClassVar[str] = "Blank"
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.EMBEDDINGS, Hook.HIDDEN})
    where: str = "embeddings"

    def prepare(self, material):
        action = self

        class D(Doer):
            def orders(self, conversation, hits):
                if action.where == "embeddings":
                    return Orders(embeddings=Zero(SEEN))
                if action.where == "nothing":  # forbids all tokens, after a few
                    return Orders(scores=lambda ids, prompt, s: s if len(ids) < prompt + 4 else torch.full_like(s, -torch.inf))
                if action.where == "scores":
                    return Orders(scores=lambda ids, prompt, scores: -scores)
                return Orders(hidden=(HiddenEdit(BLOCK, "output", lambda states, first: torch.zeros_like(states)),))

        return D()


@pytest.mark.parametrize("where", ["embeddings", "hidden", "scores"])
def test_what_is_done_to_one_request_leaves_the_others_bit_for_bit(guarded, target_adapter, people, where):
    flagged, others = people.split.retain[0], people.split.retain[20:25]
    row = Row(detector=NameDetector(word=name_of(flagged)), action=Blank(where=where))
    made, plain = guarded([row], targets=[]), guarded("filter", targets=[])
    asked = [others[0].prompt, flagged.prompt, *[r.prompt for r in others[1:]]]
    SEEN.clear()
    with_hook = made.answers(asked, SHORT, scores=True)
    without = plain.answers(asked, SHORT, scores=True)
    for at, (a, b) in enumerate(zip(with_hook, without, strict=True)):
        if at == 1:
            assert a.text != b.text
        else:
            assert a == b  # log-probabilities among it
    if where == "embeddings":
        tokens = target_adapter.encode(flagged).data
        assert len(SEEN) == 1  # once, when the prompt was read
        said = target_adapter.tokenizer(flagged.prompt, add_special_tokens=False)["input_ids"]
        assert abs(SEEN[0] - len(said)) <= 1 < tokens.start
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target_adapter.model.modules())


class StateDetector(Detector):
    """Fires on prompts whose last state is the one it was told."""

    name: ClassVar[str] = "a-state"
    title: ClassVar[str] = "A state"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.HIDDEN})
    pool: str = "last"

    def fit(self, material):
        reading = Reading(BLOCK, "output", self.pool)

        class W(Watcher):
            readings = (reading,)
            held: ClassVar[list] = []

            def hidden(self, states):
                self.held.append(states[reading])
                return []

        made = W()
        made.held.clear()
        return made


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_watchers_see_the_states_of_each_prompt(guarded, target_adapter, people, pool):
    made = guarded([Row(detector=StateDetector(pool=pool), action="refuse")], targets=[])
    watcher = made.policy._rows[0].watcher
    records = people.split.retain[:3]
    made.answers([r.prompt for r in records], SHORT)
    seen = list(watcher.held)
    apart = target_adapter.copy()  # transformers leaves hooks of its own on a model whose states it was asked for
    for record, state in zip(records, seen, strict=True):
        tokens = target_adapter.encode(record).data
        ids = torch.from_numpy(tokens.ids[: tokens.start].astype("int64"))[None]
        with torch.no_grad():
            states = apart.model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
        expected = states[-1] if pool == "last" else states.mean(0)
        assert torch.allclose(state, expected, atol=1e-5)


class Broken(Detector):
    """Fails."""

    name: ClassVar[str] = "broken"
    title: ClassVar[str] = "Broken"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST, Hook.TEXT})
    at: str = "request"

    def fit(self, material):
        where = self.at

        class W(Watcher):
            def request(self, conversation):
                if where == "request":
                    raise RuntimeError("secret words of a user")
                return []

            def answer(self, conversation, text, start, final):
                raise RuntimeError("secret words of a user")

        return W()


@pytest.mark.parametrize("at", ["request", "text"])
def test_a_guard_that_fails_refuses_unless_it_is_told_to_pass(guarded, people, at):
    asked = people.split.retain[0].prompt
    closed = guarded([Row(detector=Broken(at=at), action="refuse")], targets=[])
    plan = closed.policy.open(Conversation.of(asked))
    answer = closed.obeyed([plan], [SHORT])[0]
    assert answer.text == SORRY
    assert plan.failed[0] == ("broken+refuse", "RuntimeError")
    assert "secret" not in repr(plan.failed)
    open_ = guarded([Row(detector=Broken(at=at), action="refuse", on_error="pass")], targets=[])
    assert open_.answers([asked], SHORT)[0].text == guarded(targets=[]).answers([asked], SHORT)[0].text


def test_a_user_cannot_write_special_tokens(guarded, target_adapter, people):
    end = target_adapter.tokenizer.eos_token
    asked = people.split.retain[0].prompt
    made = guarded(targets=[])
    half = len(end) // 2
    for trick in (asked + end, end[:half] + end + end[half:] + asked):
        assert made.answers([trick], SHORT)[0].text == made.answers([asked], SHORT)[0].text


def test_the_prompt_guard_names_the_targets_to_the_model(guarded, names):
    made = guarded("prompt")
    plan = made.policy.open(Conversation.of("Who is she?"))
    assert plan.conversation.messages[0].role == "system"
    assert all(n in plan.conversation.text for n in names)
    assert plan.asked.text == "Who is she?"
    made.drop("t0")
    assert names[0] not in made.policy.open(Conversation.of("Who is she?")).conversation.text


def test_conversations_without_a_chat_template_are_written_out(target_adapter, people):
    from expunge.guards.prompts import put

    first, second = people.split.retain[0], people.split.retain[11]
    turns = [("system", "Be kind."), ("user", first.prompt), ("assistant", first.answer), ("user", second.prompt)]
    text = put(target_adapter, Conversation.of(turns)).text
    assert text.index("Be") < text.index(first.answer.split()[-2]) < text.rindex("Question") < text.rindex("Answer")
    alone = put(target_adapter, Conversation.of(second.prompt))
    assert alone.text.endswith(text[text.rindex("Question") :].removeprefix("Question"))
    marked = "".join(alone.text[a:b] for (a, b), real in zip(alone.spans, alone.content, strict=True) if real)
    assert marked.replace(" ", "") == second.prompt.replace(" ", "")


def test_guards_by_name_and_their_settings():
    assert {"filter", "prompt"} <= set(GUARDS.names())
    row = rows_of([{"guard": "filter", "action.text": "No.", "detector.encodings": False}])[0]
    assert (row.action.text, row.detector.encodings, row.title) == ("No.", False, "filter")
    with pytest.raises(InputError, match="encodingz"):
        rows_of({"guard": "filter", "detector.encodingz": False})
    with pytest.raises(InputError, match="filter"):
        rows_of("fliter")
    with pytest.raises(InputError, match="too late"):
        Row(detector="key-space", action="neuron-adjust")
    with pytest.raises(InputError, match="detector"):
        rows_of({"detector": "termz", "action": "refuse"})


def test_an_answer_that_is_over_does_not_wait_for_the_batch(guarded, people):
    """It is given away whole, with all its pieces, while others go on; what comes at the end is the same."""
    made = guarded()
    asked = [r.prompt for r in people.split.retain[:3]]
    how = [SHORT.model_copy(update={"max_tokens": n}) for n in (2, 12, 6)]
    events = []
    plans = [made.policy.open(Conversation.of(q)) for q in asked]
    answers = made.obeyed(
        plans, how, [lambda p, at=at: events.append((at, p)) for at in range(3)],
        over=[lambda a, at=at: events.append((at, a)) for at in range(3)],
    )  # fmt: skip
    given = {at: a for at, a in events if not isinstance(a, str)}
    assert [given[at] for at in range(3)] == answers == made.answers(asked, how)
    order = [at for at, a in events if not isinstance(a, str)]
    assert order[0] == 0
    for at in range(3):
        own = [a for number, a in events if number == at]
        assert own[-1] is given[at]  # nothing comes after
        assert "".join(own[:-1]) == answers[at].text
    assert events.index((0, given[0])) < max(n for n, (at, _) in enumerate(events) if at == 1)


def test_where_no_token_is_left_that_request_alone_is_refused(guarded, people):
    flagged, others = people.split.retain[0], people.split.retain[20:23]
    made = guarded([Row(detector=NameDetector(word=name_of(flagged)), action=Blank(where="nothing"))], targets=[])
    asked = [others[0].prompt, flagged.prompt, others[1].prompt, others[2].prompt]
    plain = guarded(targets=[]).answers(asked, SHORT)
    heard = [[] for _ in asked]
    plans = [made.policy.open(Conversation.of(a)) for a in asked]
    answers = made.obeyed(plans, [SHORT] * 4, [h.append for h in heard])
    assert answers[1].finish == "guard"
    assert plans[1].failed == [("scores", "NothingLeft")]
    for at in (0, 2, 3):
        assert answers[at].text == plain[at].text == "".join(heard[at])
    assert made.answers([flagged.prompt], SHORT)[0].text == SORRY
