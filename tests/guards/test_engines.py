"""Terms barred inside an engine: driven as vLLM's V1 engine drives a processor, with rows that come, go and change places."""

import importlib.util
import json
import os
import random
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from types import SimpleNamespace

import pytest
import torch

from expunge.core.errors import InputError
from expunge.guards import engines
from expunge.guards.barring import HardBar
from expunge.guards.engines import Barring, BarTerms, read_barring
from expunge.guards.keyterms import common_words, key_terms
from expunge.guards.target import Shown, Target
from expunge.guards.terms import TermIndex

KEY = "test key of the guards, 32 bytes"
NEW = 14


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list
    added: list
    moved: list


@dataclass
class Request:
    prompt: list
    said: list = field(default_factory=list)


class Engine:
    """The part of an engine that a processor sees: a persistent batch without gaps, and greedy steps.

    Requests that end leave holes; new ones take the lowest holes; what is left is filled from the end (one-way moves), and now
    and then two rows change places, as an engine that sorts its batch does.
    """

    def __init__(self, model, processor, ends, room, seed):
        self.model, self.processor, self.ends, self.room = model, processor, ends, room
        self.rows, self.dice = [], random.Random(seed)
        self.moves = 0

    def run(self, prompts):
        """Answers' ids, in the order of the prompts."""
        requests = [Request(list(p)) for p in prompts]
        waiting = list(requests)
        while waiting or self.rows:
            self._change(waiting)
            self._step()
        return [r.said for r in requests]

    def _over(self, request):
        return len(request.said) >= NEW or (request.said and request.said[-1] in self.ends)

    def _change(self, waiting):
        removed = [at for at, r in enumerate(self.rows) if self._over(r)]
        holes, added, moved = sorted(removed), [], []
        rows = [None if at in removed else r for at, r in enumerate(self.rows)]
        fresh = self.dice.randint(0, 2) if any(r is not None for r in rows) else 1
        while waiting and fresh and (holes or len(rows) < self.room):
            request, fresh = waiting.pop(0), fresh - 1
            at = holes.pop(0) if holes else len(rows)
            rows[at : at + 1] = [request]
            added.append((at, SimpleNamespace(logprobs=None), request.prompt, request.said))
        replaced = {at for at, *_ in added}
        while None in rows:
            if rows[-1] is None:
                rows.pop()
                continue
            hole, last = rows.index(None), len(rows) - 1
            moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
            rows[hole] = rows.pop()
        if len(rows) > 1 and self.dice.random() < 0.6:
            one, other = self.dice.sample(range(len(rows)), 2)
            moved.append((one, other, MoveDirectionality.SWAP))
            rows[one], rows[other] = rows[other], rows[one]
        self.moves += len(moved)
        self.rows = rows
        removed = sorted(
            (at for at in removed if at not in replaced), reverse=True
        )  # those that were replaced are not told apart
        changed = removed or added or moved
        self.processor.update_state(BatchUpdate(len(rows), removed, added, moved) if changed else None)

    @torch.no_grad()
    def _step(self):
        if not self.rows:
            return
        logits = torch.stack([self.model(torch.tensor([[*r.prompt, *r.said]])).logits[0, -1].float() for r in self.rows])
        logits = self.processor.apply(logits)
        for request, row in zip(self.rows, logits, strict=True):
            request.said.append(int(row.argmax()))


@pytest.fixture(scope="module")
def place(tmp_path_factory, target_adapter):
    folder = tmp_path_factory.mktemp("engine")
    target_adapter.save(folder / "model")
    return folder


@pytest.fixture
def processor(place, monkeypatch):
    """A function that makes a processor of targets."""

    def make(targets, kind=BarTerms):
        said = [t.model_dump(mode="json", exclude={"id", "until"}) for t in targets]
        (place / "bar.yaml").write_text(json.dumps({"guards": ["filter"], "targets": said}))
        monkeypatch.setenv(engines.FILE, str(place / "bar.yaml"))
        monkeypatch.setenv(engines.KEY, KEY)
        model = SimpleNamespace(tokenizer=str(place / "model"), tokenizer_revision=None)
        return kind(SimpleNamespace(model_config=model), torch.device("cpu"), False)

    return make


def hidden(people, names):
    """One target for each person: the name, questions and answers."""
    made = []
    for name in names:
        shown = tuple(Shown(prompt=r.prompt, answer=r.answer) for r in people.split.forget if name in r.prompt)
        made.append(Target(entities=(name,), examples=shown))
    return made


def terms(record):
    """What the answer of a record tells, found in a text."""
    made = TermIndex(KEY.encode())
    made.add("it", key_terms(record.answer, record.prompt, common_words([])))
    return made


def asked(adapter, records):
    return [adapter.encode(r).data.ids[: adapter.encode(r).data.start].tolist() for r in records]


@pytest.fixture(scope="module")
def alone(target_adapter):
    """A function that gives a request's answer without an engine, row by row, with what is barred for it."""

    @torch.no_grad()
    def make(prompt, barring, tokenizer):
        labels = barring.labels(tokenizer.decode(prompt, skip_special_tokens=True))
        bar, said = HardBar(barring.index, tokenizer, labels, BarTerms.candidates), []
        while len(said) < NEW and (not said or said[-1] not in target_adapter.end_ids):
            ids = torch.tensor([[*prompt, *said]])
            said.append(int(bar(ids[0], len(prompt), target_adapter.model(ids).logits[0, -1].float()).argmax()))
        return said

    return make


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_request_keeps_its_own_terms_while_rows_come_go_and_change_places(
    processor, alone, target_adapter, people, names, seed
):
    target_adapter.model.eval()
    made = processor(hidden(people, names))
    dice = random.Random(seed)
    records = dice.sample(people.split.forget, 7) + dice.sample(people.split.retain, 5)
    dice.shuffle(records)
    prompts = asked(target_adapter, records)
    engine = Engine(target_adapter.model, made, target_adapter.end_ids, room=4, seed=seed)
    answers = engine.run(prompts)
    assert engine.moves > 5
    assert made._rows == {}, "nothing is left of requests that have ended"
    expected = [alone(p, made._barring, made.tokenizer) for p in prompts]
    assert answers == expected
    with torch.no_grad():
        bare = [alone(p, Barring([], KEY.encode()), made.tokenizer) for p in prompts]
    texts = [made.tokenizer.decode(a, skip_special_tokens=True) for a in answers]
    told = []
    for record, text, open_ in zip(records, texts, bare, strict=True):
        free = made.tokenizer.decode(open_, skip_special_tokens=True)
        told += [bool(terms(record).find(free))]
        if record in people.split.forget:
            assert not terms(record).find(text)
            assert not any(n in text for n in names)
        elif not any(n in free for n in names):
            assert text == free, "requests about others are as they were"
    assert sum(told) > 4, "the bare model tells them"


def test_the_driver_notices_a_processor_that_loses_track(processor, alone, target_adapter, people, names):
    """Without following moves, rows would be barred by each other's terms: the test above must be able to fail."""

    class Lost(BarTerms):
        def update_state(self, batch_update):
            if batch_update is not None:
                still = BatchUpdate(batch_update.batch_size, batch_update.removed, batch_update.added, [])
                super().update_state(still)

    target_adapter.model.eval()
    made = processor(hidden(people, names), Lost)
    records = [*people.split.forget[:6], *people.split.retain[:6]]
    random.Random(0).shuffle(records)
    prompts = asked(target_adapter, records)
    try:
        answers = Engine(target_adapter.model, made, target_adapter.end_ids, room=4, seed=0).run(prompts)
    except IndexError:
        return
    assert answers != [alone(p, made._barring, made.tokenizer) for p in prompts]


def test_the_file_is_read_again_for_requests_that_run_and_a_broken_one_is_passed_over(processor, place, monkeypatch):
    monkeypatch.setattr(engines, "_LOOK", 0.0)
    made = processor([Target(entities=("Ida Else",))])
    said = []
    made.update_state(BatchUpdate(1, [], [(0, None, [5, 6], said)], []))

    def write(text):
        (place / "bar.yaml").write_text(text)
        os.utime(place / "bar.yaml", ns=(time.time_ns(), time.time_ns()))
        made.update_state(None)

    def barred(name):
        return bool(made._rows[0].bar.index.find(f"It was {name}."))

    assert barred("Ida Else")
    write("targets: [{entities: [Jane Quickfinger]}]")
    assert barred("Jane Quickfinger")
    assert not barred("Ida Else")
    write("targets: [{entities: [Omar")
    assert barred("Jane Quickfinger")
    (place / "bar.yaml").unlink()
    made.update_state(None)
    assert barred("Jane Quickfinger")
    assert made._rows[0].said is said


def test_what_would_tell_or_cannot_be_barred_is_refused(processor, tmp_path, monkeypatch):
    made = processor([Target(entities=("Ida Else",))])
    assert made.is_argmax_invariant() is False
    assert made.needs_output_token_ids() is True
    BarTerms.validate_params(SimpleNamespace(logprobs=None, prompt_logprobs=None))
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(ValueError, match="would tell"):
            BarTerms.validate_params(SimpleNamespace(**{name: 0}))
    made.update_state(BatchUpdate(1, [], [(0, None, None, [4, -1])], []))
    with pytest.raises(RuntimeError, match="placeholders"):
        made.apply(torch.zeros(1, len(made.tokenizer)))
    made.update_state(BatchUpdate(1, [0], [(0, None, None, [])], []))
    nothing = made.apply(torch.full((1, len(made.tokenizer)), -torch.inf))
    assert int(nothing.argmax()) == made.tokenizer.eos_token_id
    with pytest.raises(InputError, match="no term that could be barred"):
        Barring([Target(topics=("gardening",))], KEY.encode())
    with pytest.raises(InputError, match="cannot be read"):
        read_barring(tmp_path / "none.yaml", KEY.encode())
    monkeypatch.setenv(engines.KEY, "short")
    with pytest.raises(InputError, match="no key"):
        BarTerms(SimpleNamespace(), torch.device("cpu"), False)


def test_it_is_a_processor_of_vllm_where_vllm_is_installed():
    """Checked only where vLLM can be imported; elsewhere the class stands alone, and the driver above is what holds it."""
    if importlib.util.find_spec("vllm") is None:
        assert BarTerms.__mro__[1] is object
        return
    from vllm.v1.sample.logits_processor import LogitsProcessor

    assert issubclass(BarTerms, LogitsProcessor)
    assert not BarTerms.__abstractmethods__
