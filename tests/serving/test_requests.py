"""Forget requests that come and go while the server runs; keys, roles and rates."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from expunge.core.errors import InputError
from expunge.guards.policy import SORRY
from expunge.guards.target import Target
from expunge.serving.access import Access, Rates
from expunge.serving.config import Guards, Limits, guard_key, read_guards
from expunge.serving.server import check_open, check_url
from expunge.serving.store import MemoryStore
from tests.serving.test_answers import ask, said

FORGET = "/v1/expunge/requests"


def test_a_target_is_hidden_when_the_request_is_answered_and_open_when_it_is_withdrawn(serve, forget):
    question, name = forget[0]
    with serve() as client:
        before = said(ask(client, question))
        began = time.perf_counter()
        made = client.post(FORGET, json={"entities": [name], "reason": "asked by the person"})
        assert made.status_code == 201
        assert said(ask(client, question)) == SORRY != before
        assert time.perf_counter() - began < 5
        entry = made.json()
        assert (entry["state"], entry["summary"]) == ("active", "1 name")
        assert client.get(f"{FORGET}/{entry['id']}").json() == entry
        assert [e["id"] for e in client.get(FORGET).json()["data"]] == [entry["id"]]
        gone = client.delete(f"{FORGET}/{entry['id']}")
        assert gone.json()["state"] == "withdrawn"
        assert said(ask(client, question)) == before
        assert client.delete(f"{FORGET}/{entry['id']}").json() == gone.json()
        assert [e["state"] for e in client.get(FORGET, params={"state": "active"}).json()["data"]] == []
        assert name not in client.get(FORGET).text


def test_the_same_request_is_taken_once(serve, forget):
    body, other = {"entities": [forget[0][1]]}, {"entities": ["Another Name"]}
    with serve() as client:

        def send(given):
            return client.post(FORGET, json=given, headers={"idempotency-key": "k1"})

        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(send, [body] * 16))
        assert sorted(r.status_code for r in replies) == [200] * 15 + [201]
        assert len({r.json()["id"] for r in replies}) == 1
        assert send(other).status_code == 409
        assert len(client.get(FORGET).json()["data"]) == 1
        assert client.post(FORGET, json=body, headers={"idempotency-key": "x" * 300}).status_code == 400


@pytest.mark.parametrize(
    "body", [{}, {"entities": []}, {"entities": ["a"]}, {"entities": ["!!!"]}, {"entities": ["x" * 500]},
             {"entites": ["A Name"]}, {"examples": [{}]}, {"until": "yesterday", "entities": ["A Name"]},
             {"until": "2001-01-01T00:00:00Z", "entities": ["A Name"]},
             {"entities": [5]}, {"entities": ["\ud800 name"]}],
)  # fmt: skip
def test_targets_that_hide_nothing_or_too_much_are_refused_with_the_reason(serve, body):
    import json

    with serve() as client:
        reply = client.post(FORGET, content=json.dumps(body), headers={"content-type": "application/json"})
        assert reply.status_code in (400, 422), reply.text
        assert len(reply.json()["error"]["message"]) > 20
        assert client.get(FORGET).json()["data"] == []


def test_a_request_ends_by_itself(serve, forget):
    question, name = forget[0]
    with serve() as client:
        until = datetime.now(UTC) + timedelta(seconds=1.2)
        made = client.post(FORGET, json={"entities": [name], "until": until.isoformat()}).json()
        assert said(ask(client, question)) == SORRY
        deadline = time.monotonic() + 10
        while client.get(f"{FORGET}/{made['id']}").json()["state"] == "active":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert datetime.now(UTC) >= until
        assert said(ask(client, question)) != SORRY


def test_keys_and_roles(serve, keys, retain):
    access, asks, administers, path = keys
    assert asks not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    with serve(access=access) as client:
        assert ask(client, retain[0]).status_code == 401
        client.headers["authorization"] = "Bearer wrong"
        assert ask(client, retain[0]).status_code == 401
        assert client.get(FORGET).status_code == 401
        client.headers["authorization"] = f"Bearer {asks}"
        assert said(ask(client, retain[0]))
        assert client.post(FORGET, json={"entities": ["A Name"]}).status_code == 403
        client.headers["authorization"] = f"Bearer {administers}"
        assert client.post(FORGET, json={"entities": ["A Name"]}).status_code == 201
        assert ask(client, retain[0]).status_code == 403
        del client.headers["authorization"]
        assert client.get("/health").status_code == 200


def test_rates_are_kept_for_each_client(serve, keys, retain):
    access, asks, administers, _ = keys
    with serve(access=access, limits=Limits(tokens=4, rate=0.1)) as client:
        client.headers["authorization"] = f"Bearer {asks}"
        assert ask(client, retain[0]).status_code == 200
        late = ask(client, retain[0])
        assert late.status_code == 429
        assert 1 <= int(late.headers["retry-after"]) <= 11
        client.headers["authorization"] = f"Bearer {administers}"
        assert client.get(FORGET).status_code == 200
    rates = Rates(2.0, 1.0)
    assert [rates.take("a", 0.0) for _ in range(3)] == [0, 0, 0.5]
    assert rates.take("b", 0.0) == 0
    assert rates.take("a", 0.5) == 0


def test_guard_files_say_what_is_wrong_with_them(tmp_path):
    path = tmp_path / "guards.yaml"
    with pytest.raises(InputError, match="cannot be read"):
        read_guards(path)
    for text, match in (("[", "no YAML"), ("- a", "no mapping"), ("targets: []", "guards"), ("guards: [fliter]", "filter"),
                        ("guards: [filter]\ntarget: []", "targets"), ("guards: [filter]\ntargets: x", "list"),
                        ("guards: [{guard: filter, detector.x: 1}]", "'x'"), ("guards: []", "")):  # fmt: skip
        path.write_text(text)
        if match:
            with pytest.raises(InputError, match=match):
                read_guards(path)
    rows = "guards: [filter, {detector: always, action: {name: refuse, text: No.}}]"
    path.write_text(f"{rows}\ntargets: [{{entities: [A Name]}}]\nordinary: p.jsonl\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "What is two?", "answer": "2"}\n')
    held = read_guards(path)
    assert [r.title for r in held.guards] == ["filter", "always+refuse"]
    assert held.ordinary == str(tmp_path / "p.jsonl")
    assert isinstance(held, Guards)


def test_secrets_are_asked_for_and_kept_from_others(tmp_path, monkeypatch):
    monkeypatch.delenv("EXPUNGE_GUARD_KEY", raising=False)
    with pytest.raises(InputError, match="no key"):
        guard_key(None)
    path = tmp_path / "key"
    with pytest.raises(InputError, match="cannot be read"):
        guard_key(path)
    path.write_text("x" * 40)
    path.chmod(0o644)
    with pytest.raises(InputError, match="Others may read"):
        guard_key(path)
    path.chmod(0o600)
    assert guard_key(path) == b"x" * 40
    path.write_text("short")
    with pytest.raises(InputError, match="5 bytes"):
        guard_key(path)
    monkeypatch.setenv("EXPUNGE_GUARD_KEY", "y" * 20)
    assert guard_key(None) == b"y" * 20


def test_nobody_is_let_in_from_outside_without_keys(keys):
    check_open("127.0.0.1", Access(None))
    check_open("::1", Access(None))
    check_open("0.0.0.0", keys[0])
    with pytest.raises(InputError, match="Without keys"):
        check_open("0.0.0.0", Access(None))
    for url in ("ftp://x", "localhost:80", "http://", "http://u:p@host/v1"):
        with pytest.raises(InputError):
            check_url(url)


def test_a_kept_target_that_no_guard_can_take_in_keeps_no_other_out_and_is_told(serve, forget):
    store = MemoryStore()
    for target in (Target(id="x1", topics=("gardening",)), Target(id="x2", entities=(forget[0][1],))):
        store.add(None, target.id, target, "")
    with serve(store=store) as client:
        assert said(ask(client, forget[0][0])) == SORRY
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["open"]) == (503, 1)
        assert "expunge_targets_open 1.0" in client.get("/metrics").text
        client.delete(f"{FORGET}/x1")
        deadline = time.monotonic() + 10
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
