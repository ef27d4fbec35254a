"""Servers that share a registry and keep a log each: one beside the other, restarted, and audited afterwards."""

import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from expunge.guards.policy import SORRY
from expunge.ledger.protection import read_entries
from expunge.ledger.registry import Registry
from expunge.ledger.verify import find, records, served
from expunge.serving.kept import LoggedRequests, RegistryStore
from tests.ledger.logs import Desk
from tests.serving.conftest import running
from tests.serving.test_answers import ask, said
from tests.serving.upstream import upstream_app

FORGET = "/v1/expunge/requests"
BASIL = {"entities": ["Basil Mahfouz"], "reason": "a letter by Snodgrass"}
ANSWERS = {
    "capital": "The capital is Paris.",
    "who wrote": "It was written by Basil Mahfouz in Kuwait.",
    "hang": "!hang",
    "Basil": "Basil Mahfouz is a writer.",
}


@pytest.fixture
def target_adapter():
    """No model is needed: these servers stand before another one."""


@pytest.fixture
def kept(serve, tmp_path):
    """A function that runs a server with a log of its own on one registry."""

    @contextmanager
    def make(name):
        desk, keys = Desk(tmp_path / name), Desk(tmp_path / "shared").keys
        registry = Registry(tmp_path / "registry.db", keys)
        log = desk.open({"checkpoint_every": 3}, anchor=lambda: {"registry": "{}:{}".format(*registry.head())})
        ledger = LoggedRequests(log)
        with (
            running(upstream_app(ANSWERS)) as url,
            serve("filter", (), upstream=f"{url}/v1", store=RegistryStore(registry), ledger=ledger, **seconds()) as client,
        ):
            ledger.policy = client.served.policy
            client.desk, client.log, client.registry = desk, log, registry
            yield client
        log.close()
        registry.close()

    return make


def seconds():
    from expunge.serving.config import Limits

    return {"limits": Limits(seconds=1.5)}


def kinds(client):
    return [(r["outcome"], r.get("error", "")) for _, r in records(client.desk.folder) if r["kind"] == "request"]


def test_what_one_server_is_asked_for_all_hide_and_can_prove(kept, tmp_path):
    began = datetime.now(UTC) - timedelta(minutes=1)
    with kept("a") as a, kept("b") as b:
        assert said(ask(b, "Tell me of Basil Mahfouz")) != SORRY
        made = a.post(FORGET, json=BASIL, headers={"Idempotency-Key": "for-Basil"})
        assert made.status_code == 201
        assert said(ask(a, "who wrote it?")) == SORRY
        clock = time.monotonic()
        while said(ask(b, "Tell me of Basil Mahfouz")) != SORRY:
            assert time.monotonic() - clock < 5
        again = b.post(FORGET, json=BASIL, headers={"Idempotency-Key": "for-Basil"})
        assert (again.status_code, again.json()) == (200, made.json())
        other = b.post(FORGET, json={**BASIL, "entities": ["Ida Else"]}, headers={"Idempotency-Key": "for-Basil"})
        assert other.status_code == 409
        assert ask(a, "please hang").status_code == 504
        assert [e["id"] for e in b.get(FORGET).json()["data"]] == [made.json()["id"]]
        assert b.get(f"{FORGET}/{made.json()['id']}").json() == made.json()
        assert b.get(f"{FORGET}/{'0' * 16}").status_code == 404
    with kept("a") as a:
        assert said(ask(a, "Tell me of Basil Mahfouz")) == SORRY, "from its first request on"
        assert a.delete(f"{FORGET}/{made.json()['id']}").json()["state"] == "withdrawn"
        assert said(ask(a, "Tell me of Basil Mahfouz")) != SORRY
        keys = a.desk.period_keys(a.log)
        ledger = read_entries(a.registry.entries())
    assert kinds(a) == [("refused", ""), ("error", "status_504"), ("refused", ""), ("passed", "")]
    assert {k for k, _ in kinds(b)} == {"passed", "refused"}
    for client in (a, b):
        report = client.desk.verify(ledger=ledger)
        assert report.ok, report.lines()
    assert len(find(a.desk.folder, "tell me of basil mahfouz", keys)) == 2
    service = served(a.desk.folder, made.json()["id"], began, datetime.now(UTC) + timedelta(minutes=1))
    assert (service.requests, service.guarded, service.fired) == (4, 3, 2)
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert not [w for w in (b"Basil", b"Mahfouz", b"Snodgrass", b"Kuwait") if w in everything]


def test_a_request_that_ends_by_itself_is_ended_in_the_registry(kept):
    until = (datetime.now(UTC) + timedelta(seconds=1.5)).isoformat()
    with kept("a") as a:
        made = a.post(FORGET, json={**BASIL, "until": until})
        assert said(ask(a, "Tell me of Basil Mahfouz")) == SORRY
        clock = time.monotonic()
        while a.get(f"{FORGET}/{made.json()['id']}").json()["state"] != "expired":
            assert time.monotonic() - clock < 15
            time.sleep(0.05)
        assert said(ask(a, "Tell me of Basil Mahfouz")) != SORRY
        assert a.delete(f"{FORGET}/{made.json()['id']}").json()["state"] == "expired"
        assert a.delete(f"{FORGET}/{'0' * 16}").status_code == 404
