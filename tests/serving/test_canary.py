"""A server that tries itself out: what its canaries find is logged and told, users go before them, and they end with it."""

import json
import logging
import re
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from expunge.core.errors import InputError
from expunge.guards.policy import SORRY
from expunge.ledger.auditing import audit
from expunge.ledger.canaries import CanarySettings, history
from expunge.ledger.escrow import EscrowSettings, make_auditor_key, open_box
from expunge.ledger.evidence import export
from expunge.ledger.probes import probes
from expunge.ledger.protection import read_entries
from expunge.ledger.records import Versions
from expunge.ledger.verify import records, served
from expunge.serving import backends
from expunge.serving.config import Guards, Limits, canaries_of
from expunge.serving.kept import State
from expunge.serving.server import assemble
from tests.serving.conftest import KEY
from tests.serving.test_answers import ask, said
from tests.serving.test_requests import FORGET

FAST = CanarySettings(every=0.2, per_kind=2, tokens=24)


def metric(client, name):
    found = re.search(rf"^{re.escape(name)} ([\d.e+-]+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else None


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def tried(serve, tmp_path):
    """A function that runs a server which keeps a state and asks itself canaries."""

    @contextmanager
    def make(targets=(), settings=FAST, escrow=None, **options):
        state = State.open(tmp_path / "state", Versions("ab" * 32), escrow=escrow)
        try:
            with serve(targets=targets, state=state, canaries=settings, **options) as client:
                client.state = state
                yield client
        finally:
            state.close()

    return make


def rounds(tmp_path, kind="canary"):
    return [r for _, r in records(tmp_path / "state" / "log") if r["kind"] == kind]


def audited(tmp_path):
    state = tmp_path / "state"
    return audit(state / "log", state / "sign.pem.pub", state / "checkpoints" / "checkpoints.jsonl")


def test_a_guard_that_holds_is_shown_to_hold_through_the_whole_server(tried, forget, people, tmp_path):
    """The model knows the names; kept targets, those of the file, and one that comes later are all asked for."""
    shown = {r.prompt: r.answer for r in people.split.forget}
    names = sorted({n for _, n in forget})
    with tried(targets=names[:1]) as client:
        until(lambda: metric(client, "expunge_canary_rounds_total") >= 1)
        body = {"entities": [names[1]], "examples": [{"prompt": q, "answer": shown[q]} for q, n in forget if n == names[1]]}
        made = client.post(FORGET, json=body).json()["id"]
        until(lambda: any(p["target"] == made for r in rounds(tmp_path) for p in r["results"]))
        assert metric(client, "expunge_canary_overdue") == 0
        assert time.time() - metric(client, "expunge_canary_last_timestamp_seconds") < 20
        assert client.get("/ready").json()["canaries"]["overdue"] is False
        answers = metric(client, 'expunge_answers_total{finish="guard"}')
        assert answers is None, "what the server asks itself is no use of it"
        client.delete(f"{FORGET}/{made}")
    found = history(tmp_path / "state" / "log")
    for kind in ("direct", "disguised", "redefined"):
        assert found.held[kind].k == found.held[kind].n > 1, kind
    assert found.errors == 0
    requests = rounds(tmp_path, "request")
    assert requests
    assert all(r["canary"] for r in requests)
    assert {r["outcome"] for r in requests} >= {"refused"}
    assert len(requests) >= sum(len(r["results"]) for r in rounds(tmp_path)), "each question has its record"
    held = b"".join(p.read_bytes() for p in (tmp_path / "state").rglob("*") if p.is_file())
    assert not [n for n in names[:2] if n.encode() in held or n.split()[0].encode() in held]
    report = audited(tmp_path)
    assert report.exit_code == 0, report.lines()
    assert any("promised every 0.2 s" in line for line in report.lines())
    assert any(re.search(r"direct: held \d+ of \d+", line) for line in report.lines())


def test_a_guard_that_has_lost_a_target_is_caught_told_and_logged(tried, forget, tmp_path, caplog):
    question, name = forget[0]
    with tried() as client, caplog.at_level(logging.INFO, "expunge.canaries"):
        made = client.post(FORGET, json={"entities": [name]}).json()["id"]
        until(lambda: metric(client, "expunge_canary_rounds_total") >= 2)
        assert metric(client, "expunge_canary_failing") == 0
        lost = client.served.policy._rows[0].watcher
        lost.drop(made)  # the guard alone has lost it: registry and policy believe that it is hidden
        until(lambda: metric(client, "expunge_canary_failing") == 1)
        assert said(ask(client, question)) != SORRY
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["canaries"]["failing"]) == (200, 1)
        assert metric(client, 'expunge_canary_probes_total{kind="direct",result="fail"}') >= 1
        lost.add(client.served.policy.targets[made])
        until(lambda: metric(client, "expunge_canary_failing") == 0)
        own = client.served.app.state.parts.canaries
        asked = own._canaries._ask
        own._canaries._ask = lambda _: 1 / 0  # nothing is answered: the guard is not tried, however often
        until(lambda: own._schedule.failing == "CanariesFailed")
        own._schedule._last -= 61  # as if that had gone on for a minute
        until(lambda: metric(client, "expunge_canary_overdue") == 1)
        assert client.get("/ready").json()["canaries"]["overdue"] is True
        own._canaries._ask = asked
        until(lambda: metric(client, "expunge_canary_overdue") == 0)
    said_by = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("1 targets fail" in line and "direct" in line for line in said_by)
    assert name not in "".join(said_by)
    found = audited(tmp_path)
    assert found.canaries.failed[made] >= 1
    assert any(f"target {made}: got at" in line for line in found.lines())
    assert found.report.ok
    paths = {p.name: p for p in export(tmp_path / "state", tmp_path / "evidence")}
    shown = json.loads(paths["canaries.json"].read_text())
    assert shown["failed"] == found.canaries.failed
    assert shown["every"] == 0.2
    ledger = read_entries(paths["registry.jsonl"].read_bytes().splitlines(keepends=True))
    assert ledger.ok


def test_a_withdrawal_in_the_middle_of_a_round_is_no_failure_and_ends_the_key_of_its_probes(tried, forget, tmp_path):
    names = sorted({n for _, n in forget})
    with tried(settings=CanarySettings(every=0.05, per_kind=3, tokens=4)) as client:
        ids, registry = [], client.state.registry
        for turn in range(6):
            ids.append(client.post(FORGET, json={"entities": [names[turn % len(names)]]}).json()["id"])
            until(lambda made=ids[-1]: any(p["target"] == made for r in rounds(tmp_path) for p in r["results"]))
            time.sleep(0.01 * turn)
            key = registry.probe_key(ids[-1])
            own = {p.id for p in probes(registry.words(ids[-1])[0], key, 3, one_turn=True)}  # it has no chat template
            client.delete(f"{FORGET}/{ids[-1]}")
            asked = {p["probe"] for r in rounds(tmp_path) for p in r["results"] if p["target"] == ids[-1]}
            assert asked <= own, "ids of probes are made under the target's own key"
        with pytest.raises(InputError, match="destroyed"):
            registry.probe_key(ids[0])
    found = history(tmp_path / "state" / "log")
    assert found.failed == {}
    assert found.rounds > 6


def test_users_go_before_canaries_and_a_question_that_is_cut_short_is_asked_again(tried, forget, retain, tmp_path):
    """A canary that would write for long is given up for a user, who waits for at most a few tokens of it."""
    long = CanarySettings(every=0.01, per_kind=9, tokens=512)
    name = sorted({n for _, n in forget})[0]
    with tried(settings=long, limits=Limits(tokens=512)) as client:
        backend = client.served.app.state.parts.backend
        alone = []
        for _ in range(5):
            began = time.perf_counter()
            ask(client, retain[0], max_tokens=4)
            alone.append(time.perf_counter() - began)
        client.post(FORGET, json={"topics": ["x"], "entities": [f"{name} the Second"]})
        slow, enough = threading.Event(), threading.Event()
        whole = backend.guarded.obeyed

        def obeyed(plans, *rest, cancelled, **more):
            if len(plans) == 1 and cancelled[0].__class__.__name__ == "partial":
                slow.set()
                while not cancelled[0]() and not enough.is_set():  # as a long answer: until a user comes
                    time.sleep(0.01)
            return whole(plans, *rest, cancelled=cancelled, **more)

        backend.guarded.obeyed = obeyed
        waited = []
        for _ in range(5):
            assert slow.wait(10)
            slow.clear()
            began = time.perf_counter()
            assert said(ask(client, retain[0], max_tokens=4))
            waited.append(time.perf_counter() - began)
        enough.set()
        until(lambda: metric(client, "expunge_canary_rounds_total") >= 1)
        assert metric(client, 'expunge_canary_probes_total{kind="direct",result="error"}') is None
    assert max(waited) < max(alone) + 1.0
    assert history(tmp_path / "state" / "log").errors == 0


def test_canaries_that_find_no_moment_of_their_own_go_along_with_users(tried, forget, retain, monkeypatch):
    monkeypatch.setattr(backends, "_PATIENCE", 0.2)
    with tried(settings=CanarySettings(every=0.01, per_kind=9, tokens=24)) as client:
        stop = threading.Event()
        client.served.app.state.parts.backend._yields = lambda job: True  # alone, none gets to its end

        def busy(number):
            with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as own:
                while not stop.is_set():
                    ask(own, retain[number], max_tokens=24)

        crowd = [threading.Thread(target=busy, args=(n,)) for n in range(4)]
        for one in crowd:
            one.start()
        client.post(FORGET, json={"entities": [f"{forget[0][1]} the Second"]})
        begun = metric(client, "expunge_canary_rounds_total")
        until(lambda: metric(client, "expunge_canary_rounds_total") >= begun + 2, 40)
        assert metric(client, 'expunge_canary_probes_total{kind="direct",result="pass"}') >= 1
        assert metric(client, 'expunge_canary_probes_total{kind="direct",result="error"}') is None
        stop.set()
        for one in crowd:
            one.join()


def test_the_end_of_the_server_ends_a_round_and_the_log_holds(tried, forget, tmp_path):
    """A round that would go on for minutes is broken off; what it has found stands in the log, marked."""
    names = sorted({n for _, n in forget})
    with tried(settings=CanarySettings(every=60, per_kind=1000, most=100_000, tokens=64)) as client:
        for name in names:
            client.post(FORGET, json={"entities": [name, f"{name} Junior"]})
        assert len(client.served.policy.targets) == len(names)
        client.served.app.state.parts.canaries._schedule._over.wait(0.3)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    found = audited(tmp_path)
    assert found.report.ok
    assert found.report.records["stop"] == 1


def test_false_refusals_are_counted_and_told(tried, forget, retain, tmp_path):
    asked = [*retain[:6], forget[0][0], forget[1][0]]
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps({"prompt": q, "answer": "x"}) + "\n" for q in asked))
    with tried(targets=[forget[0][1]], file={"retain": str(tmp_path / "retain.jsonl")}) as client:
        until(lambda: metric(client, "expunge_canary_refused_ratio") is not None and rounds(tmp_path, "retain"))
        acted = sum(forget[0][1] in q for q in asked)
        until(lambda: metric(client, "expunge_canary_refused_ratio") == acted / 8)
    found = rounds(tmp_path, "retain")[0]
    assert (found["refused"]["k"], found["refused"]["n"], found["errors"]) == (acted, 8, 0)


def test_how_often_is_said_in_the_guard_file_and_what_cannot_be_is_refused(tmp_path):
    (tmp_path / "retain.jsonl").write_text('{"prompt": "What is two?", "answer": "2"}\n')
    rows = {"guards": ["filter"], "retain": str(tmp_path / "retain.jsonl"), "targets": [{"entities": ["Ida Else"]}]}
    held = Guards(**rows)
    assert held.canaries.every == 3600
    assert Guards(**rows, canaries=False).canaries is None
    assert Guards(**rows, canaries="off").canaries is None
    assert Guards(**rows, canaries="30m").canaries.every == 1800
    assert Guards(**rows, canaries={"every": "2h", "per_kind": 3}).canaries == CanarySettings(every=7200, per_kind=3)
    assert canaries_of("90s", CanarySettings(per_kind=5)) == CanarySettings(every=90, per_kind=5)
    for wrong in ("1 week", "0h", "-1h", ""):
        with pytest.raises(InputError, match="no length of time"):
            canaries_of(wrong)
    with pytest.raises(InputError, match="need a log"):
        assemble(held, key=KEY, upstream="http://127.0.0.1:1/v1", canaries=FAST)
    state = State.open(tmp_path / "state", Versions("ab" * 32))
    both = held.model_copy(update={"ordinary": held.retain})
    with pytest.raises(InputError, match="ordinary prompts"):
        assemble(both, key=KEY, upstream="http://127.0.0.1:1/v1", state=state, canaries=FAST)
    state.close()


def test_records_of_canaries_are_counted_for_no_target_and_never_kept_in_full(tried, forget, tmp_path):
    public = make_auditor_key(tmp_path / "auditor.pem")
    began = datetime.now(UTC) - timedelta(minutes=1)
    with tried(escrow=EscrowSettings(auditor=str(public), share=1.0)) as client:
        made = client.post(FORGET, json={"entities": [forget[0][1]]}).json()["id"]
        assert said(ask(client, forget[0][0])) == SORRY
        until(lambda: metric(client, "expunge_canary_rounds_total") >= 2)
    service = served(tmp_path / "state" / "log", made, began, datetime.now(UTC) + timedelta(minutes=1))
    assert (service.requests, service.guarded, service.fired) == (1, 1, 1)
    (box,) = (tmp_path / "state" / "escrow").glob("*.box")
    opened, digest = open_box(box, tmp_path / "auditor.pem")
    assert opened["messages"] == [["user", forget[0][0]]]
    assert [(r["id"], r["escrow"]) for r in rounds(tmp_path, "request") if "escrow" in r] == [(opened["record"], digest)]
