"""The log holds what happened to each request, not a word of what was said, and survives kills and full disks."""

import base64
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Answer
from expunge.guards.policy import Policy
from expunge.ledger import appending
from expunge.ledger.errors import LedgerFailed, Shredded
from expunge.ledger.records import Request, Versions
from expunge.ledger.verify import decided_again, find, records, seed_holds, served
from tests.ledger.logs import JANE, OMAR, Desk, a_policy, ask, filled

ROOT = Path(__file__).resolve().parents[2]


def kinds(desk):
    return [r["kind"] for _, r in records(desk.folder)]


def requests(desk):
    return [r for _, r in records(desk.folder) if r["kind"] == "request"]


def test_a_record_says_what_was_decided_and_by_what(tmp_path):
    at = datetime(2026, 11, 28, 16, 18, 59, tzinfo=UTC)
    desk, _ = filled(tmp_path, 2, clock=lambda: at)
    passed, refused = requests(desk)
    assert passed["outcome"] == "passed"
    assert passed["finish"] == "stop"
    assert (passed["prompt_tokens"], passed["answer_tokens"]) == (9, 5)
    assert passed["rows"] == [{"row": 0, "detector": "terms", "action": "refuse", "decision": "passed", "hits": []}]
    assert set(passed["hooks_ms"]) == {"request", "text"}
    assert refused["outcome"] == "refused"
    assert refused["rows"][0]["decision"] == "acted"
    assert refused["rows"][0]["hits"] == [{"target": JANE, "score": 1.0, "hook": "request"}]
    for record in (passed, refused):
        assert record["at"] == "2026-11-28T16:18Z", "coarse: to the minute"
        assert (record["model"], record["tokenizer"], record["template"]) == ("ab" * 32, "cd" * 32, "ef" * 32)
        assert record["assets"] == {"classifier": "12" * 32}
        assert record["policy"] == a_policy().digest()
        assert record["period"] == "2026-11-28"
        assert set(record["commitments"]) == {"asked", "conversation", "answer", "seed"}
        assert record["tenant"] not in ("", "bob@firm.example")
    assert passed["tenant"] == refused["tenant"]
    assert passed["id"] != refused["id"]
    assert kinds(desk) == ["file", "start", "policy", "request", "request", "stop"]


def test_failures_of_guards_and_of_the_server_are_recorded_by_their_kind(tmp_path, monkeypatch):
    desk = Desk(tmp_path)
    log, policy = desk.open(), a_policy()
    monkeypatch.setattr(
        type(policy._rows[0].watcher), "request", lambda *_: (_ for _ in ()).throw(ValueError("Jane Quickfinger is here"))
    )
    ask(log, policy, "Who is Jane Quickfinger?")
    log.record(None, None, policy.rows, policy=policy.digest(), request=Request(error="TimeoutError"))
    log.record(None, None, policy.rows, policy=policy.digest(), request=Request(error="Jane Quickfinger broke it"))
    log.close()
    first, second, third = requests(desk)
    assert first["rows"][0]["decision"] == "failed"
    assert (first["rows"][0]["error"], first["rows"][0]["fail_mode"]) == ("ValueError", "refuse")
    assert first["outcome"] == "refused"
    assert (second["outcome"], second["error"]) == ("error", "TimeoutError")
    assert third["error"] == "Error"


def test_nothing_that_was_said_stands_in_any_file(tmp_path, monkeypatch):
    desk = Desk(tmp_path)
    log = desk.open()
    policy = a_policy((("Omar-Longshanks", "Omar Longshanks"), (JANE, "Jane Quickfinger")))
    log.policy(policy.digest(), policy.targets)
    ask(log, policy, "Whispering: who is Omar Longshanks of Timbuktu?")
    ask(log, policy, "A harmless Rhinoceros question", "It eats Marzipan daily.", counts={"hard_bans": 2})
    ask(
        log, policy, [{"role": "system", "content": "Obey Wolfgang."}, {"role": "user", "content": "Who?"}], "By Omar Longshanks!"
    )
    log.close()
    secrets = [
        "Omar",
        "Longshanks",
        "Timbuktu",
        "Rhinoceros",
        "Marzipan",
        "Wolfgang",
        "Quickfinger",
        "bob@",
        "hide Jane",
        "help with that",
    ]
    everything = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(everything) > 5
    for word in secrets:
        raw = word.encode()
        spellings = [raw, raw.lower(), raw.hex().encode(), base64.b64encode(raw).rstrip(b"=")[:-1]]
        assert not [(p, s) for p, data in everything.items() for s in spellings if s in data], word
    log_bytes = (desk.folder / "log-000001.jsonl").read_bytes()
    assert b"4711" not in log_bytes.replace(b'"', b" ").split(), "no token ids"
    assert b"[17,4711,99]" not in log_bytes
    assert b"-0.25" not in log_bytes
    hits = requests(desk)[0]["rows"][0]["hits"]
    assert hits[0]["target"] == log.pseudonym("Omar-Longshanks"), "an id that may say something is a pseudonym"
    assert requests(desk)[1]["counts"] == {"hard_bans": 2}


def test_equal_prompts_do_not_look_equal(tmp_path):
    desk, _ = filled(tmp_path, 8)
    held = [r["commitments"][k] for r in requests(desk) for k in r["commitments"]]
    assert len(set(held)) == len(held)


def test_text_is_refused_where_a_number_or_a_digest_must_stand(tmp_path):
    with pytest.raises(InputError, match="no digest"):
        Versions("the Jane model")
    with pytest.raises(InputError, match="no digest"):
        Versions("ab" * 32, assets={"classifier": "Jane"})
    desk = Desk(tmp_path)
    log, policy = desk.open(), a_policy()
    for counts in ({"Jane Quickfinger": 1}, {"bans": "Jane"}, {"bans": True}):
        with pytest.raises(InputError, match="Text is never logged"):
            ask(log, policy, "Hello", counts=counts)
    desk = Desk(tmp_path / "b")
    with pytest.raises(InputError, match="beside the log"):
        type(log)(desk.folder, desk.keys, desk.signer, desk.folder / "c.jsonl", versions=log.versions)


def test_a_disputed_text_is_found_with_the_key_of_its_period_only(tmp_path):
    desk, log = filled(tmp_path, 8)
    keys = desk.period_keys(log)
    found = find(desk.folder, "  WHO is\tJane   Quickfinger? ", keys)
    assert [f.what for f in found] == ["asked"] * 4
    assert all(f.record["outcome"] == "refused" for f in found)
    assert [f.what for f in find(desk.folder, "I know nothing of it.", keys)] == ["answer"] * 4
    whole = Conversation.of("What is 2 plus 2?")
    assert [f.what for f in find(desk.folder, whole, keys)] == ["conversation"]
    assert find(desk.folder, "Who is Jane?", keys) == []
    assert find(desk.folder, "Who is Jane Quickfinger?", {}) == []
    assert find(desk.folder, "Who is Jane Quickfinger?", dict.fromkeys(keys, b"x" * 32)) == []
    record = find(desk.folder, "What is 2 plus 2?", keys)[0].record
    key = keys[record["period"]]
    assert seed_holds(record, 2, key)
    assert not seed_holds(record, 3, key)


def test_the_decision_can_be_made_again(tmp_path):
    desk, log = filled(tmp_path, 2)
    text = "Who is Jane Quickfinger?"
    record = find(desk.folder, text, desk.period_keys(log))[0].record
    assert decided_again(record, a_policy(), Conversation.of(text)) == []
    other = a_policy(((OMAR, "Jane Quickfinger"),))
    assert decided_again(record, other, Conversation.of(text)) == [
        "the policy is another one",
        "row 0 (terms) fires for other targets",
    ]
    assert decided_again(record, a_policy(), Conversation.of("Who?")) == ["row 0 (terms) fires for other targets"]


def test_keys_are_destroyed_after_their_time_and_that_is_noted(tmp_path):
    at = [datetime(2026, 11, 28, 23, 30, tzinfo=UTC)]
    desk, policy = Desk(tmp_path), a_policy()
    log = desk.open({"period": "hour", "keep_days": 1}, clock=lambda: at[0])
    ask(log, policy, "First question")
    key = desk.period_keys(log)
    at[0] += timedelta(hours=1)
    ask(log, policy, "Second question")
    assert log.periods.names() == ["2026-11-28T23", "2026-11-29T00"]
    assert len(find(desk.folder, "First question", key)) == 1
    assert log.destroy_old_keys() == []
    at[0] = datetime(2026, 11, 30, 0, 0, tzinfo=UTC)
    assert log.destroy_old_keys() == ["2026-11-28T23"]
    with pytest.raises(Shredded):
        log.periods.export("2026-11-28T23")
    assert find(desk.folder, "First question", desk.period_keys(log)) == []
    at[0] += timedelta(hours=1)
    ask(log, policy, "Third question")
    assert log.periods.names() == ["2026-11-30T01"], "the first record of a period has the old ones destroyed"
    at[0] += timedelta(hours=25)
    log.close()
    again = desk.open({"period": "hour", "keep_days": 1}, clock=lambda: at[0])
    assert again.periods.names() == [], "a start destroys what is over, too"
    again.close()
    assert desk.verify().destroyed == ("2026-11-28T23", "2026-11-29T00", "2026-11-30T01")
    assert desk.verify().ok


def test_it_goes_on_after_it_was_closed_and_in_new_files(tmp_path):
    desk, log = filled(tmp_path, 30, {"rotate_bytes": 4096})
    assert len(list(desk.folder.glob("log-*.jsonl"))) > 3
    again = desk.open({"rotate_bytes": 4096})
    assert again.log == log.log
    assert again.pseudonym("x") == log.pseudonym("x")
    ask(again, a_policy(), "Hello")
    again.close()
    again.close()
    with pytest.raises(LedgerFailed):
        ask(again, a_policy(), "Too late")
    report = desk.verify()
    assert report.ok, report.lines()
    assert (report.records["request"], report.crashes, report.uncovered) == (31, 0, 0)
    assert max(p.stat().st_size for p in desk.folder.glob("log-*.jsonl")) < 4096 + 2000


def test_one_process_writes_at_a_time(tmp_path):
    desk, log = filled(tmp_path, 1, close=False)
    with pytest.raises(InputError, match="Another process"):
        desk.open()
    log.close()
    desk.open().close()


@pytest.mark.parametrize("cut", [1, 7, 300])
def test_a_torn_line_is_cut_noted_and_the_chain_goes_on(tmp_path, cut):
    desk, log = filled(tmp_path, 3, close=False)
    whole = desk.lines()
    log._stack.close()  # as a kill leaves it
    with (desk.folder / "log-000001.jsonl").open("ab") as file:
        file.write(whole[-1][:cut])
    torn = desk.verify()
    assert [p.code for p in torn.problems] == ["incomplete"]
    again = desk.open()
    again.close()
    report = desk.verify()
    assert report.ok, report.lines()
    assert (report.repairs, report.crashes) == (1, 1)
    assert desk.lines()[: len(whole)] == whole
    note = json.loads(desk.lines()[len(whole)])
    assert (note["kind"], note["cut_bytes"]) == ("repair", cut)


def test_a_kill_while_a_file_is_begun(tmp_path):
    desk, log = filled(tmp_path, 3, close=False)
    log._stack.close()
    for rest in (b"", b'{"at":"20'):
        (desk.folder / f"log-{len(list(desk.folder.iterdir())) + 1:06d}.jsonl").write_bytes(rest)
        desk.open().close()
        assert desk.verify().ok, desk.verify().lines()
    assert desk.verify().files == 3


def test_a_first_start_that_was_killed_can_be_done_again(tmp_path):
    desk = Desk(tmp_path)
    desk.open().close()
    first = desk.lines()[:2]
    for kept in (first, first[:1], [first[0][:20]], []):
        desk.put(kept)
        desk.checkpoints.unlink()
        desk.open().close()
        assert desk.verify().ok


@pytest.mark.parametrize("name", ["log", "checkpoints"])
def test_a_log_that_was_changed_is_not_gone_on_with(tmp_path, name):
    desk, _ = filled(tmp_path, 5)
    if name == "log":
        desk.put(desk.lines()[:-2])
        said = "there are"
    else:
        desk.checkpoints.unlink()
        said = "checkpoints are not there"
    with pytest.raises(InputError, match=said):
        desk.open()


def test_changed_bytes_stop_the_next_start(tmp_path):
    desk, _ = filled(tmp_path, 3)
    lines = desk.lines()
    lines[4] = lines[4].replace(b'"refused"', b'"passed"')
    desk.put(lines)
    with pytest.raises(InputError, match="does not fit its digest"):
        desk.open()


def worker(base, count, sync, limit=0):
    code = (
        "import os, resource, sys; from pathlib import Path; from tests.ledger.logs import Desk, a_policy, ask\n"
        "from expunge.core.errors import ExpungeError\n"
        "log = Desk(Path(sys.argv[1])).open({'sync': sys.argv[3], 'checkpoint_every': 5, 'rotate_bytes': 20000})\n"
        "policy = a_policy()\n"
        "os.write(1, b'ready\\n'); sys.stdin.readline()\n"
        "for at in range(int(sys.argv[2])):\n"
        "    made = ask(log, policy, f'Question {at} on Jane Quickfinger')\n"
        "    os.write(1, (made + '\\n').encode())\n"
        "log.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-c", code, str(base), str(count), sync]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_every_acknowledged_record_survives_a_kill(tmp_path):
    desk, dice, said = Desk(tmp_path), random.Random(3), set()
    for turn in range(3):
        child = worker(tmp_path, 100_000, ("each", "batched")[turn % 2])
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        said.add(child.stdout.readline().strip())
        time.sleep(dice.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        said |= {line.strip() for line in child.stdout if line.endswith("\n")}
        child.wait()
        desk.open().close()
        held = [r["id"] for r in requests(desk)]
        assert said <= set(held)
        assert len(held) == len(set(held)) <= len(said) + turn + 1
        report = desk.verify()
        assert report.ok, report.lines()
        assert report.crashes == turn + 1
    assert len(said) > 10


@pytest.fixture
def room():
    """A function that limits how large a file may grow, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, signal_before)


@pytest.mark.parametrize("more", [0, 1, 500])
def test_a_full_disk_is_said_and_the_log_goes_on_when_there_is_room(tmp_path, room, more):
    desk, log = filled(tmp_path, 3, close=False)
    policy, head = a_policy(), log.head
    room((desk.folder / "log-000001.jsonl").stat().st_size + more)
    for _ in range(2):
        with pytest.raises(LedgerFailed, match="could not be written"):
            ask(log, policy, "No room for this")
    assert log.head == head
    room(resource.RLIM_INFINITY)
    ask(log, policy, "Room for this")
    log.close()
    report = desk.verify()
    assert report.ok, report.lines()
    assert report.records["request"] == 4


def test_a_full_disk_when_a_file_is_begun(tmp_path, monkeypatch):
    desk, log = filled(tmp_path, 8, {"rotate_bytes": 7000}, close=False)
    while log._lines.size < 7000:
        ask(log, a_policy(), "Another")
    write, files = os.write, len(list(desk.folder.glob("log-*.jsonl")))
    monkeypatch.setattr(appending.os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(LedgerFailed):
        ask(log, a_policy(), "No room")
    monkeypatch.setattr(appending.os, "write", write)
    ask(log, a_policy(), "Room")
    log.close()
    assert desk.verify().ok
    assert desk.verify().files == files + 1


def test_a_place_of_checkpoints_that_fails_is_told_and_caught_up_with(tmp_path):
    desk, log = filled(tmp_path, 1, close=False)
    signed = log._checkpoints.last.n
    log._checkpoints._file.broken = True
    for _ in range(9):
        ask(log, a_policy(), "Hello")
    assert "failed before" in log.failing
    assert log.overdue == 13 - signed > 4
    assert [p.code for p in desk.verify().problems] == ["unsigned"]
    log._checkpoints._file.broken = False
    ask(log, a_policy(), "Hello")
    assert (log.failing, log.overdue) == ("", 0)
    log.close()
    assert desk.verify().ok


def test_checkpoints_are_published_and_a_publisher_that_fails_stops_nothing(tmp_path):
    sent = []

    def publish(line):
        sent.append(line)
        if len(sent) == 2:
            raise RuntimeError("Jane Quickfinger")

    desk, log = filled(tmp_path, 8, publish=publish, close=False)
    assert b"".join(sent) == desk.checkpoints.read_bytes()
    assert len(sent) == 3
    log.close()
    assert desk.verify().ok


def count_syncs(monkeypatch):
    calls, real = [], os.fdatasync
    monkeypatch.setattr(appending.os, "fdatasync", lambda handle: (calls.append(time.monotonic()), real(handle))[1])
    return calls


def test_each_record_is_on_the_disk_before_it_is_acknowledged(tmp_path, monkeypatch):
    desk = Desk(tmp_path)
    log, policy = desk.open({"checkpoint_every": 1000}), a_policy()
    calls = count_syncs(monkeypatch)
    for at in range(5):
        ask(log, policy, "Hello")
        assert len(calls) == at + 1
    log.close()


def test_batched_records_are_on_the_disk_soon(tmp_path, monkeypatch):
    desk = Desk(tmp_path)
    log, policy = desk.open({"checkpoint_every": 1000, "sync": "batched", "interval": 0.2}), a_policy()
    calls = count_syncs(monkeypatch)
    for _ in range(20):
        ask(log, policy, "Hello")
    assert len(calls) <= 2
    time.sleep(0.6)
    assert calls
    assert log._synced == log._n
    log.close()


def test_a_disk_that_does_not_hold_what_it_was_told_stops_the_log(tmp_path, monkeypatch):
    desk = Desk(tmp_path)
    log, policy = desk.open(), a_policy()
    real = os.fdatasync
    monkeypatch.setattr(appending.os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(LedgerFailed):
        ask(log, policy, "Hello")
    monkeypatch.setattr(appending.os, "fdatasync", real)
    with pytest.raises(LedgerFailed, match="failed before"):
        ask(log, policy, "Hello")
    with pytest.raises(LedgerFailed):
        log.close()
    desk.open().close()
    assert desk.verify().ok


def test_many_threads_write_one_chain(tmp_path):
    desk = Desk(tmp_path)
    log, policy = desk.open({"checkpoint_every": 7, "rotate_bytes": 15_000}), a_policy()
    made, failures = [], []

    def work(at):
        try:
            for k in range(25):
                made.append(ask(log, policy, f"Question {at} {k} on Jane Quickfinger"))
                if k % 10 == at:
                    policy_now = f"{at:02d}{k:02d}" * 16
                    log.policy(policy_now, [JANE] if k % 2 else [JANE, OMAR])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert not failures
    assert sorted(r["id"] for r in requests(desk)) == sorted(made)
    report = desk.verify()
    assert report.ok, report.lines()
    assert report.files > 5


def test_what_was_hidden_can_be_followed(tmp_path):
    at = [datetime(2026, 11, 28, 12, tzinfo=UTC)]
    desk, policy = Desk(tmp_path), a_policy(((JANE, "Jane Quickfinger"),))
    log = desk.open(clock=lambda: at[0])
    log.policy(policy.digest(), policy.targets)
    log.policy(policy.digest(), policy.targets)
    ask(log, policy, "Who is Omar Longshanks?")
    at[0] += timedelta(minutes=5)
    policy = a_policy()
    log.policy(policy.digest(), policy.targets)
    ask(log, policy, "Who is Omar Longshanks?")
    ask(log, policy, "Hello")
    at[0] += timedelta(minutes=5)
    policy = a_policy(((JANE, "Jane Quickfinger"),))
    log.policy(policy.digest(), policy.targets)
    ask(log, policy, "Who is Omar Longshanks?")
    log.close()
    assert kinds(desk).count("policy") == 3
    begin = datetime(2026, 11, 28, 12, tzinfo=UTC)
    counts = [served(desk.folder, OMAR, begin + timedelta(minutes=m), begin + timedelta(minutes=m + 5)) for m in (0, 5, 10)]
    assert [(s.requests, s.guarded, s.fired) for s in counts] == [(1, 0, 0), (2, 2, 1), (1, 0, 0)]
    again = desk.open(clock=lambda: at[0])
    again.record(None, None, [], policy="", request=Request(error="E"))
    again.close()
    late = served(desk.folder, JANE, begin + timedelta(minutes=10), begin + timedelta(minutes=20))
    assert (late.requests, late.guarded) == (2, 1), "after a start nothing counts as hidden until it is noted"


def test_an_answer_that_is_revised_or_reworded_counts_as_modified(tmp_path):
    from expunge.guards.parts import Material
    from expunge.guards.policy import Row
    from expunge.guards.target import Target

    row = Row(detector="always", action={"name": "instruct", "text": "Be silent on {targets}."})
    policy = Policy([row], Material(targets=[Target(id=JANE, entities=("Jane Quickfinger",))], key=b"k" * 32))
    desk = Desk(tmp_path)
    log = desk.open()
    plan = policy.open(Conversation.of("Hello"))
    log.record(plan, Answer("Good day.", "stop", 3), policy.rows, policy=policy.digest())
    log.close()
    assert requests(desk)[0]["outcome"] == "modified"
    assert b"Be silent" not in b"".join(desk.lines())
