"""Faults on whole servers, as processes: full disks, kills, time that passes while they are down, two of them on one registry.

Each stands before a server of this process, so that no model has to be loaded.
"""

import itertools
import json
import shutil
import threading
import time
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from expunge.cli.main import main
from expunge.guards.policy import SORRY
from expunge.ledger.auditing import audit
from expunge.ledger.evidence import export
from expunge.ledger.log import Keeping
from expunge.ledger.places import Places
from expunge.ledger.records import Versions
from expunge.ledger.verify import records
from expunge.serving.kept import State
from tests.ledger.conftest import cluster  # noqa: F401  (a PostgreSQL of the tests' own)
from tests.serving.conftest import running
from tests.serving.machine import Process, SmallDisk, kept
from tests.serving.test_answers import CHAT, ask, said
from tests.serving.test_requests import FORGET
from tests.serving.upstream import upstream_app


@pytest.fixture
def target_adapter():
    """No model is needed: these servers stand before another one."""


@pytest.fixture(scope="module")
def behind():
    """The address of a server that says the names it is asked for."""
    with running(upstream_app({"slowly": "!stalls", "Tell me of": "He was a writer of books."})) as url:
        yield f"{url}/v1"


@pytest.fixture
def server(behind, tmp_path):
    """A function that makes a server's process; all of them are ended."""
    made = []

    def make(name="a", *words, state=None, **options):
        made.append(
            Process(tmp_path / name, ("--upstream", behind, "--state", state or tmp_path / name / "state", *words), **options)
        )
        return made[-1]

    yield make
    for one in made:
        if hasattr(one, "process") and one.process.poll() is None:
            one.kill()


def hidden(one, name):
    return said(ask(one.client, f"Tell me of {name}.")) == SORRY


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def holds(state, tmp_path, **options):
    """Whether log and registry hold for an auditor; what was found."""
    out = tmp_path / f"evidence-{time.monotonic_ns()}"
    export(state, out, **options)
    found = audit(
        state / "log", state / "sign.pem.pub", state / "checkpoints" / "checkpoints.jsonl", ledger=out / "registry.jsonl"
    )
    assert found.exit_code == 0, found.lines()
    return found


def full_disk(one, fill, clear):
    """A server whose disk fills while targets are asked for: refused with the reason, nothing lost, and on again with room."""
    acknowledged = []
    for at in range(3):
        assert one.forget(f"Early Person{at}", f"early-{at}").status_code == 201
        acknowledged.append(f"Early Person{at}")
    fill()
    replies = []
    for at in range(400):  # what is left in half-filled pages of the database may take some
        replies.append(one.forget(f"Late Person{at}", f"late-{at}"))
        if replies[-1].status_code != 201:
            break
        acknowledged.append(f"Late Person{at}")
    refused = replies[-1]
    assert refused.status_code == 507, refused.text
    assert "no room" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"]
    assert "Person" not in refused.text
    gone = one.client.delete(f"{FORGET}/{one.client.get(FORGET).json()['data'][0]['id']}")
    assert gone.status_code == 507
    for name in acknowledged[:3]:  # no answer without a record: refused or not given, never the words
        reply = ask(one.client, f"Tell me of {name}.")
        assert reply.status_code == 503 or said(reply) == SORRY
        assert "writer" not in reply.text
    assert one.client.get("/health").status_code == 200
    clear()
    until(lambda: one.client.get("/ready").status_code == 200)
    again = one.forget(f"Late Person{len(replies) - 1}", f"late-{len(replies) - 1}")
    assert again.status_code == 201, again.text
    acknowledged.append(f"Late Person{len(replies) - 1}")
    assert all(hidden(one, name) for name in acknowledged)
    assert not hidden(one, "Ida Else")
    return acknowledged


@pytest.mark.slow
def test_a_full_disk_loses_nothing_and_the_server_goes_on_without_a_restart(server, tmp_path):
    disk = SmallDisk.mounted(tmp_path / "disk")
    try:
        one = server(state=(disk.path if disk else tmp_path / "a") / "state")
        with one:
            if disk:
                names = full_disk(one, disk.fill, disk.clear)
            else:  # without the right to mount a disk the size of files stands for it
                biggest = max(p.stat().st_size for p in (tmp_path / "a" / "state").rglob("*") if p.is_file())
                names = full_disk(one, lambda: one.files_at_most(biggest), lambda: one.files_at_most(2**40))
        with one:
            assert all(hidden(one, name) for name in names)
        shutil.copytree((disk.path if disk else tmp_path / "a") / "state", tmp_path / "copy")
    finally:
        if disk:
            disk.unmount()
    holds(tmp_path / "copy", tmp_path)


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_as_a_full_disk(server, tmp_path):
    one = server()
    with one:
        state = tmp_path / "a" / "state"

        def fill():
            sizes = [p.stat().st_size for p in state.rglob("*") if p.is_file() and p.suffix in (".jsonl", ".db")]
            one.files_at_most(max(sizes))

        names = full_disk(one, fill, lambda: one.files_at_most(2**40))
        assert all(hidden(one, name) for name in names)
    holds(state, tmp_path)


def test_what_hides_nothing_or_everything_is_refused_with_the_reason(server, tmp_path):
    prompts = [f"What do you think of a walk in the park number {n}?" for n in range(12)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "x"}) + "\n" for p in prompts))
    with server(guards="guards: [filter]\nordinary: prompts.jsonl\n") as one:
        for body, why in (
            ({}, "empty"), ({"entities": [], "topics": []}, "empty"), ({"entities": ["!?"]}, "no letter"),
            ({"entities": ["a"]}, "match much"), ({"entities": ["the"]}, "refuse them all"),
            ({"entities": ["park"]}, "refuse them all"), ({"topics": ["gardening"]}, "No guard here"),
            ({"entities": ["x" * 300]}, "held back"),
        ):  # fmt: skip
            reply = one.client.post(FORGET, json=body)
            assert 400 <= reply.status_code < 500, (body, reply.text)
            assert why in reply.json()["error"]["message"], (body, reply.text)
        assert one.client.get(FORGET).json()["data"] == []
        assert not hidden(one, "the park")
        assert one.client.get("/ready").json()["targets"] == 0


@pytest.mark.slow
def test_kills_while_requests_come_in_lose_nothing_that_was_acknowledged(server, tmp_path):
    """kill -9 in the middle of writes, then again; replayed at each start; a repeated request is the same one."""
    one, sent, made = server(), {}, {}
    for turn in range(3):
        one.begin()
        for name in made:
            assert hidden(one, name)
        stop = threading.Event()

        def work(number, turn=turn, stop=stop):
            for at in itertools.count():
                name = f"Person{turn}x{number}x{at} Kept"
                sent[name] = f"key-{turn}-{number}-{at}"
                try:
                    reply = httpx.post(f"{one.client.base_url}{FORGET}", json={"entities": [name]}, timeout=20,
                                       headers={"idempotency-key": sent[name]}, trust_env=False)  # fmt: skip
                except httpx.HTTPError:
                    return
                assert reply.status_code == 201
                made[name] = reply.json()["id"]
                if stop.is_set():
                    return

        crowd = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for member in crowd:
            member.start()
        until(lambda turn=turn: sum(n.startswith(f"Person{turn}x") for n in made) >= 6)
        one.process.kill()
        stop.set()
        for member in crowd:
            member.join()
        one.process.wait()
    with one:
        lost = [n for n in sent if n not in made]
        assert lost, "a request was under way at each kill"
        assert all(hidden(one, name) for name in made)
        held = {e["id"] for e in one.client.get(FORGET, params={"limit": 1000}).json()["data"]}
        assert set(made.values()) <= held <= {*made.values(), *held}
        for name in lost:
            again = one.forget(name, sent[name])
            assert again.status_code in (200, 201), "either it was kept before the kill, or it is now; never twice"
            assert hidden(one, name)
        ids = [e["id"] for e in one.client.get(FORGET, params={"limit": 1000}).json()["data"]]
        assert len(ids) == len(set(ids)) == len(sent)
    found = holds(tmp_path / "a" / "state", tmp_path)
    assert found.report.crashes == 3
    assert not [n for n in sent if n.split()[0].encode() in kept(tmp_path / "a" / "state")]


def test_what_expires_while_the_server_is_down_is_open_and_shredded_after(server, tmp_path):
    one = server()
    with one:
        end = datetime.now(UTC) + timedelta(seconds=2)
        made = one.forget("Brief Person", until=end.isoformat()).json()["id"]
        stays = one.forget("Lasting Person").json()["id"]
        assert hidden(one, "Brief Person")
        one.kill()
    while datetime.now(UTC) <= end:
        time.sleep(0.05)
    with one:
        assert not hidden(one, "Brief Person")
        assert hidden(one, "Lasting Person")
        assert one.client.get(f"{FORGET}/{made}").json()["state"] == "expired"
    keys = [p.name for p in (tmp_path / "a" / "state" / "keys").iterdir()]
    assert not [k for k in keys if made in k]
    assert [k for k in keys if stays in k]
    holds(tmp_path / "a" / "state", tmp_path)


def test_a_withdrawal_while_streams_run_lets_each_end_under_the_plan_it_began_with(server, behind):
    """A stream that was refused stays refused, one that runs ends, and the next request is answered."""
    with server() as one:
        made = one.forget("Basil Mahfouz").json()["id"]
        body = {"messages": [{"role": "user", "content": "slowly, please"}], "stream": True}
        refused = {"messages": [{"role": "user", "content": "Tell me of Basil Mahfouz."}], "stream": True}
        with one.client.stream("POST", CHAT, json=body) as running_one:
            lines = running_one.iter_lines()
            assert "assistant" in next(lines)
            with one.client.stream("POST", CHAT, json=refused) as other:
                events = other.iter_lines()
                next(events)
                assert one.client.delete(f"{FORGET}/{made}").json()["state"] == "withdrawn"
                assert SORRY.split()[0] in "".join(events)
            assert not hidden(one, "Basil Mahfouz")
            again = one.forget("Basil Mahfouz").json()["id"]
            assert again != made
            assert hidden(one, "Basil Mahfouz")
        assert one.client.get("/ready").status_code == 200


@pytest.fixture
def shared(cluster):  # noqa: F811
    return cluster.make()


@pytest.mark.slow
def test_two_servers_on_one_postgresql_see_each_others_targets_within_a_second(server, shared, tmp_path):
    words = ("--registry", shared, "--key-folder", tmp_path / "keys", "--master-key-file", tmp_path / "master" / "key")
    first, second = server("a", *words), server("b", *words)
    with first, second:
        waits = []
        for turn in range(6):
            asked, other = (first, second) if turn % 2 else (second, first)
            name = f"Shared Person{turn}"
            made = asked.forget(name)
            began = time.monotonic()
            assert made.status_code == 201
            assert hidden(asked, name)
            until(lambda other=other, name=name: hidden(other, name), 5)
            waits.append(time.monotonic() - began)
        assert max(waits) < 1.0, waits
        gone = first.client.get(FORGET).json()["data"][0]["id"]
        second.client.delete(f"{FORGET}/{gone}")
        began = time.monotonic()
        until(lambda: not hidden(first, "Shared Person0"), 5)
        assert time.monotonic() - began < 1.0
        assert not hidden(second, "Shared Person0")
        assert "master key lies" not in first.said
    places = [Places(tmp_path / n / "state", tmp_path / "master" / "key", tmp_path / "keys") for n in "ab"]
    prints = set()
    for place in places:
        holds(place.state, tmp_path, registry=shared, places=place)
        start = next(r for _, r in records(place.state / "log") if r["kind"] == "start")
        prints.add(start["versions"]["assets"]["guard_key"])
    assert len(prints) == 1, "digests of both are under the registry's own key"


def test_keys_beside_the_data_are_warned_of_and_can_stand_elsewhere(tmp_path, capfd, monkeypatch):
    for name in ("EXPUNGE_GUARD_KEY", "EXPUNGE_MASTER_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "guards.yaml").write_text("guards: [filter]\n")

    def check(*words):
        capfd.readouterr()
        line = ["serve", "--upstream", "http://127.0.0.1:1/v1", "--guard", tmp_path / "guards.yaml", "--check", *words]
        return main(list(map(str, line))), capfd.readouterr().err

    state = tmp_path / "state"
    code, told = check("--state", state)
    assert (code, "The master key lies in the state folder" in told) == (0, True)
    (state / "master.key").rename(tmp_path / "elsewhere.key")
    code, told = check("--state", state)
    assert (code, "is missing, and there are keys under it" in told) == (2, True)
    assert not (state / "master.key").exists(), "a new one would open nothing"
    moved = ("--state", state, "--master-key-file", tmp_path / "elsewhere.key")
    code, told = check(*moved)
    assert (code, "master key lies" in told) == (0, False)
    monkeypatch.setenv("EXPUNGE_MASTER_KEY", (tmp_path / "elsewhere.key").read_text().strip())
    code, told = check("--state", state)
    assert (code, "master key lies" in told) == (0, False)
    starts = [r for _, r in records(state / "log") if r["kind"] == "start"]
    assert len(starts) == 3
    assert len({s["versions"]["assets"]["guard_key"] for s in starts}) == 1, "the guards' secret is the registry's own"
    assert check("--state", state, "--canaries", "sometimes")[0] == 2
    for word in ("--key-folder", "--master-key-file", "--canaries"):
        code, told = check("--key", tmp_path / "elsewhere.key", word, "1h")
        assert (code, f"{word} belong to --state" in told) == (2, True)
    monkeypatch.delenv("EXPUNGE_MASTER_KEY")
    assert "state folder" in Places(state, state / "sub" / "key").exposed
    assert "folder of keys" in Places(tmp_path / "s", tmp_path / "k" / "master", tmp_path / "k").exposed
    out = tmp_path / "evidence"
    assert main(["evidence", str(state), "--out", str(out), "--master-key-file", str(tmp_path / "elsewhere.key")]) == 0
    assert {p.name for p in out.iterdir()} == {"registry.jsonl", "canaries.json"}


def test_a_clock_that_jumps_and_periods_that_change(serve, behind, tmp_path):
    """Forward: what is over ends, keys of old periods go, a new file is begun. Back: nothing that has ended comes again."""
    jump = timedelta(0)
    state = State.open(
        tmp_path / "state", Versions("ab" * 32), keeping=Keeping(keep_days=0.5), clock=lambda: datetime.now(UTC) + jump
    )
    with serve("filter", (), upstream=behind, state=state) as client:

        def forget(name, **more):
            return client.post(FORGET, json={"entities": [name], **more}).json()["id"]

        def shown(name):
            return client.get(f"{FORGET}/{name}").json()

        def closed(name):
            return said(ask(client, f"Tell me of {name}.")) == SORRY

        brief = forget("Brief Person", until=(datetime.now(UTC) + timedelta(hours=1)).isoformat())
        lasting = forget("Lasting Person")
        assert closed("Brief Person")
        first = state.log.periods.names()
        jump = timedelta(days=-2)
        later = forget("Later Person")
        assert closed("Brief Person")
        assert closed("Later Person")
        assert shown(later)["created"] >= shown(lasting)["created"], "entries stay in order, whatever the clock says"
        jump = timedelta(days=2)
        began = time.monotonic()
        until(lambda: shown(brief)["state"] == "expired", 5)
        assert time.monotonic() - began < 1.5
        assert not closed("Brief Person")
        assert closed("Lasting Person")
        assert not set(first) & set(state.log.periods.names()), "their keys were kept for half a day"
        jump = timedelta(0)
        time.sleep(1)
        assert not closed("Brief Person")
        assert shown(brief)["state"] == "expired"
        assert closed("Lasting Person")
        assert client.get("/ready").status_code == 200
    state.close()
    found = holds(tmp_path / "state", tmp_path)
    assert found.report.files == 2, "one begun on the day two days ahead; none when the clock is put back"
    assert set(first) <= set(found.report.destroyed)
    requests = [r for _, r in records(tmp_path / "state" / "log") if r["kind"] == "request"]
    assert len({r["period"] for r in requests}) == 3
