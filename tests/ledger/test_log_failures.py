"""The log survives kills, torn lines, full disks and places that fail; it is on the disk when it says so."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expunge.core.errors import InputError
from expunge.ledger import appending
from expunge.ledger.errors import LedgerFailed
from tests.ledger.logs import Desk, a_policy, ask, filled, requests

ROOT = Path(__file__).resolve().parents[2]


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
