"""Targets are kept once they are acknowledged, in no file in clear, and gone when they are withdrawn."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sql

from expunge.core.errors import InputError
from expunge.guards.target import Shown, Target
from expunge.ledger import database as db
from expunge.ledger.errors import Conflict, LedgerFailed, NoSuchTarget, Shredded
from expunge.ledger.keys import KeyStore, MasterKey, opened
from expunge.ledger.protection import read_entries
from expunge.ledger.registry import Registry
from tests.ledger.conftest import Place

JANE = Target(
    entities=("Jane Quickfinger", "J. Quickfinger"), examples=(Shown(prompt="Where does Jane live?", answer="Zanzibar"),)
)
NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[2]


def person(name):
    return Target(entities=(name,))


def words(registry):
    return {t.entities[0] for t in registry.active()}


def writer(place, prefix, count=100_000, limit=0):
    command = [sys.executable, "-m", "tests.ledger.writer", place.where, str(place.folder), prefix, str(count), str(limit)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def begin(child):
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    child.stdin.write("go\n")
    child.stdin.flush()


def test_what_is_asked_for_is_active_and_can_be_shown(place):
    registry = place.open()
    stored = registry.request("k1", JANE, "a letter", basis="erasure")
    assert (stored.state, stored.scope, stored.basis) == ("active", "2 names, 1 example", "erasure")
    again = place.open()
    assert again.active() == [JANE.model_copy(update={"id": stored.id})]
    assert again.words(stored.id) == (JANE.model_copy(update={"id": stored.id}), "a letter")
    assert again.show(stored.id) == stored
    assert again.targets() == [stored] == again.targets("active")
    assert again.targets("withdrawn") == []


def test_the_same_key_gives_the_same_answer_and_other_words_a_conflict(place):
    registry = place.open()
    first = registry.request("k1", JANE, "why")
    assert registry.request("k1", JANE, "why") == first
    assert place.open().request("k1", JANE, "why") == first
    for other in [(person("Else Body"), "why"), (JANE, "another reason"), (JANE, "why", datetime(2099, 1, 1, tzinfo=UTC))]:
        with pytest.raises(Conflict):
            registry.request("k1", *other)
    with pytest.raises(Conflict):
        registry.request("k1", JANE, "why", basis="court")
    assert len(registry.targets()) == 1
    assert registry.request("k2", JANE, "why").id != first.id


def test_an_id_that_says_nothing_is_taken_once(place):
    registry = place.open()
    made = registry.request("k", JANE.model_copy(update={"id": "0123456789abcdef"}))
    assert (made.id, made.new) == ("0123456789abcdef", True)
    again = registry.request("k", JANE.model_copy(update={"id": "f" * 16}))
    assert (again.id, again.new) == (made.id, False), "the same wish: the id that it has"
    with pytest.raises(InputError, match="this id already"):
        registry.request("other", person("Else Body").model_copy(update={"id": made.id}))
    assert len(registry.targets()) == 1


def test_targets_are_listed_as_they_came(place):
    registry = place.open()
    ids = [registry.request(f"k{at}", person(f"Person Number{at}")).id for at in range(7)]
    registry.withdraw(ids[2])
    assert [s.id for s in registry.targets()] == ids
    assert [s.id for s in registry.targets(after=ids[1], limit=3)] == ids[2:5]
    assert [s.id for s in registry.targets("active", after=ids[0], limit=2)] == [ids[1], ids[3]]
    assert registry.targets(after=ids[-1]) == []
    with pytest.raises(NoSuchTarget):
        registry.targets(after="0" * 16)


def test_withdrawing_ends_it_once(place):
    registry = place.open()
    kept, gone = (registry.request(k, person(f"Name {k}")) for k in ("one", "two"))
    ended = registry.withdraw(gone.id)
    assert ended.state == "withdrawn"
    assert registry.withdraw(gone.id) == ended, "asked twice, it is done once"
    assert [t.id for t in registry.active()] == [kept.id]
    with pytest.raises(Shredded):
        registry.words(gone.id)
    assert registry.request("two", person("Name two")).state == "withdrawn", "the same wish is not a new one"
    with pytest.raises(NoSuchTarget):
        registry.withdraw("0" * 16)
    with pytest.raises(NoSuchTarget):
        registry.show("0" * 16)


def test_targets_end_at_their_time(place):
    at = [NOON]
    registry = place.open(clock=lambda: at[0])
    short = registry.request("a", person("Short Lived"), until=NOON + timedelta(hours=1))
    registry.request("b", Target(entities=("Longer Lived",), until=NOON + timedelta(hours=2)))
    registry.request("c", person("For Ever"))
    assert registry.expire() == []
    at[0] += timedelta(hours=1)
    assert words(registry) == {"Longer Lived", "For Ever"}, "what is over is not hidden, whether or not it was noticed"
    assert registry.expire() == [short.id]
    assert registry.expire() == []
    assert registry.show(short.id).state == "expired"
    assert registry.show(short.id).ended == at[0]
    assert not list(place.keys.names(f"target-{registry._id}-{short.id}"))
    assert registry.withdraw(short.id).state == "expired"


def test_wrong_wishes_are_refused_before_anything_is_kept(place):
    registry = place.open(clock=lambda: NOON)
    for arguments, said in [
        (("", JANE), "1 to 200"), (("k" * 201, JANE), "1 to 200"), (("k", Target()), "empty"), (("k", person("!!")), "no letter"),
        (("k", Target(id="mine", entities=("Jane Q",))), "may say something"), (("k", JANE, "", NOON), "past"),
        (("k", JANE, "", datetime(2030, 1, 1)), "no zone"),
        (("k", Target(entities=("Jane Q",), until=NOON + timedelta(days=1)), "", NOON + timedelta(days=2)), "two times"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=said):
            registry.request(*arguments)
    with pytest.raises(InputError, match="no basis"):
        registry.request("k", JANE, basis="whim")
    assert registry.targets() == []
    assert registry.head()[0] == 0
    assert len(list(place.keys.names())) == 1, "no key but the registry's own"


def all_bytes(place, cluster=None):
    folder = place.folder if cluster is None else cluster.folder
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def spellings(text):
    return [f(s).encode(e) for e in ("utf-8", "utf-16-le") for s in (text,) for f in (str, str.lower)] + [
        text.encode().hex().encode()
    ]


def test_no_word_of_a_target_stands_in_any_file(place, request):
    registry = place.open()
    stored = registry.request("for Jane Quickfinger", JANE, "a letter of her lawyer Snodgrass")
    registry.withdraw(registry.request("two", person("Gonewith Thewind")).id)
    cluster = None if place.where.endswith(".db") else request.getfixturevalue("cluster")
    files = {**all_bytes(place), **(all_bytes(place, cluster) if cluster else {})}
    assert cluster or any(p.name.endswith("-wal") and data for p, data in files.items()), "the write-ahead log is looked at too"
    assert any(stored.id.encode() in data for data in files.values()), "the search would find what is there"
    for word in ("Quickfinger", "Zanzibar", "Snodgrass", "Thewind", "for Jane"):
        for seen in spellings(word):
            assert not [p for p, data in files.items() if seen in data], word


def test_a_withdrawn_target_is_gone_from_old_copies_too(local, tmp_path):
    registry = local.open()
    kept, gone = registry.request("a", person("Kept Here")), registry.request("b", person("Gone There"))
    registry.close()
    copy = tmp_path / "copy.db"
    shutil.copy(local.where, copy)
    with sqlite3.connect(copy) as connection:
        held = dict(connection.execute("SELECT id, sealed FROM expunge_targets").fetchall())
    name = f"target-{registry._id}-{gone.id}"
    key = local.keys.get(name)
    assert b"Gone There" in opened(key, held[gone.id], registry._bound(gone.id)), "the copy could be read before"
    before = (local.folder / "keys" / f"{name}.key").read_bytes()
    handle = (local.folder / "keys" / f"{name}.key").open("rb")
    local.open().withdraw(gone.id)
    assert handle.read() != before, "its file was written over before it was removed"
    old = Registry(copy, local.keys)
    with pytest.raises(LedgerFailed, match="data key"):
        old.active()
    with pytest.raises(Shredded):
        old.words(gone.id)
    assert old.words(kept.id)[0].entities == ("Kept Here",)
    assert b"sealed" not in held[gone.id]
    with sqlite3.connect(local.where) as connection:
        assert connection.execute("SELECT sealed FROM expunge_targets WHERE id = ?", [gone.id]).fetchone() == (None,)


def test_the_number_of_sealed_bytes_does_not_tell_a_short_name_from_a_long_one(local):
    registry = local.open()
    for at in range(1, 30):
        registry.request(f"k{at}", person("abc" * at))
    with sqlite3.connect(local.where) as connection:
        sizes = {row[0] for row in connection.execute("SELECT length(sealed) FROM expunge_targets")}
    assert len(sizes) == 1


def test_keys_are_for_their_owner_alone_and_belong_to_their_registry(local, tmp_path):
    registry = local.open()
    registry.request("k", JANE)
    for path in [Path(local.where), local.folder / "master.key", *(local.folder / "keys").iterdir()]:
        assert path.stat().st_mode & 0o077 == 0, path
    with pytest.raises(InputError, match="not the one of this registry"):
        Registry(local.where, KeyStore(tmp_path / "others", MasterKey.from_file(local.folder / "master.key")))
    with pytest.raises(InputError, match="does not open under this master key"):
        Registry(local.where, KeyStore(local.folder / "keys", MasterKey(b"x" * 32)))
    os.chmod(local.folder / "master.key", 0o644)
    with pytest.raises(InputError, match="chmod 600"):
        local.open()


def test_sealed_words_cannot_be_moved_to_another_target(local):
    registry = local.open()
    a, b = registry.request("a", person("Alice Able")), registry.request("b", person("Bob Baker"))
    with sqlite3.connect(local.where) as connection:
        sealed = connection.execute("SELECT sealed FROM expunge_targets WHERE id = ?", [a.id]).fetchone()[0]
        connection.execute("UPDATE expunge_targets SET sealed = ? WHERE id = ?", [sealed, b.id])
    with pytest.raises(LedgerFailed, match="does not open"):
        registry.active()


def test_all_keys_can_be_put_under_another_master_key(local):
    registry = local.open()
    stored = registry.request("k", JANE)
    keys = local.keys
    assert keys.rewrap(MasterKey(b"n" * 32)) == 2
    assert keys.rewrap(MasterKey(b"n" * 32)) == 0
    fresh = Registry(local.where, KeyStore(local.folder / "keys", MasterKey(b"n" * 32)))
    assert fresh.words(stored.id)[0].entities == JANE.entities
    assert fresh.request("k", JANE) == stored
    with pytest.raises(InputError, match="does not open under this master key"):
        local.open()


def test_a_database_of_another_version_is_refused(place):
    registry = place.open()
    with registry._db.write() as connection:
        connection.execute(db.facts.update().where(db.facts.c.name == "schema").values(value="7"))
    with pytest.raises(InputError, match="version 7; this Expunge reads version 1"):
        place.open()


@pytest.mark.parametrize("where", ["mysql://x/y", "postgresql:/x", "sqlite://", ":memory:", "/dev/null/x.db", "nonsense://a"])
def test_a_place_that_cannot_be_is_refused(where, tmp_path):
    with pytest.raises(InputError):
        Registry(where, KeyStore(tmp_path / "keys", MasterKey(b"k" * 32)))


def test_a_server_that_does_not_answer_is_said_to(tmp_path):
    with pytest.raises(LedgerFailed, match="could not be written"):
        Registry(f"postgresql://nobody@/none?host={tmp_path}", KeyStore(tmp_path / "keys", MasterKey(b"k" * 32)))


def test_changes_come_in_order_without_a_gap(place):
    registry, other = place.open(), place.open()
    snapshot, seq = registry.snapshot()
    assert (snapshot, seq) == ([], 0)
    a = registry.request("a", person("Alice Able"))
    b = registry.request("b", person("Bob Baker"))
    seen = other.changes_since(0)
    assert [(c.seq, c.kind, c.id) for c in seen] == [(1, "requested", a.id), (2, "requested", b.id)]
    assert [c.target.entities for c in seen] == [("Alice Able",), ("Bob Baker",)]
    registry.withdraw(a.id)
    assert [(c.seq, c.kind, c.target) for c in other.changes_since(2)] == [(3, "withdrawn", None)]
    assert [c.target is None for c in other.changes_since(0)] == [True, False, True], "the words of what has ended are gone"
    assert other.changes_since(3) == []
    assert [c.seq for c in other.changes_since(0, limit=2)] == [1, 2]


def test_many_threads_and_two_objects_ask_at_once(place):
    registries = [place.open(), place.open()]
    failures, ids = [], []

    def work(at):
        try:
            wanted = [(at + k) % 8 for k in range(6)]
            ids.extend(registries[at % 2].request(f"key-{n}", person(f"Person number {n}")).id for n in wanted)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(set(ids)) == 8 == len(registries[0].targets())
    assert read_entries(registries[0].entries()).ok
    assert registries[0].head()[0] == 8


def test_two_processes_write_one_registry(place):
    place.open().close()
    children = [writer(place, f"p{at}", 12) for at in range(2)]
    for child in children:
        begin(child)
    said = [child.communicate(timeout=60) for child in children]
    assert all("failed" not in out and out.endswith("done\n") for out, _ in said), said
    registry = place.open()
    assert len(registry.targets()) == 24
    assert len(registry.targets("withdrawn")) == 8
    assert read_entries(registry.entries()).ok
    assert registry.head()[0] == 32


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill_at_any_moment(place):
    dice = random.Random(5)
    asked, withdrawn, unknown = {}, set(), []
    place.open().close()
    for turn in range(8):
        child = writer(place, f"r{turn}")
        begin(child)
        lines = [child.stdout.readline()]
        time.sleep(dice.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
        assert child.wait() == -signal.SIGKILL
        for word, key, made in (line.split()[:3] for line in lines if line.endswith("\n")):
            assert word != "failed"
            (asked.__setitem__(key, made) if word == "asked" else withdrawn.add(made))
        unknown.append(f"r{turn}-{sum(k.startswith(f'r{turn}-') for k in asked)}")
        registry = place.open()
        stored = {s.id: s for s in registry.targets(limit=100_000)}
        assert set(asked.values()) <= set(stored), "an acknowledged request is lost"
        assert len(asked) <= len(stored) <= len(asked) + turn + 1, "something is doubled"
        assert {i for i in withdrawn if stored[i].state != "withdrawn"} == set()
        held = registry.active()
        assert len({t.entities for t in held}) == len(held)
        assert {t.id for t in held} == {s.id for s in stored.values() if s.state == "active"}, "something is half there"
        names = set(place.keys.names(f"target-{registry._id}"))
        assert not {f"target-{registry._id}-{s.id}" for s in stored.values() if s.state != "active"} & names
        assert read_entries(registry.entries()).ok
        registry.close()
    registry = place.open()
    for key in unknown:  # who got no answer asks again
        first = registry.request(key, person(f"Secretname {key}"), f"because of {key}")
        assert registry.request(key, person(f"Secretname {key}"), f"because of {key}").id == first.id
    assert len(registry.targets(limit=100_000)) == len({*asked, *unknown})
    assert len(asked) > 20
    registry.tidy()
    assert len(list(place.keys.names(f"target-{registry._id}"))) == len(registry.active())


def test_a_full_disk_is_said_and_loses_nothing(local):
    local.open().close()
    child = writer(local, "full", limit=150_000)
    begin(child)
    out, complaint = child.communicate(timeout=60)
    lines = [line.split() for line in out.splitlines()]
    assert lines[-2][:3] == ["failed", lines[-2][1], "LedgerFailed"], (out, complaint)
    assert "disk is full or fails" in " ".join(lines[-2])
    assert "Secretname" not in complaint + " ".join(lines[-2])
    registry = local.open()
    asked = {made for word, _, made in (line[:3] for line in lines[:-2]) if word == "asked"}
    assert len(asked) > 2
    assert {s.id for s in registry.targets(limit=100_000)} == asked
    again = registry.request(lines[-2][1], person(f"Secretname {lines[-2][1]}"), f"because of {lines[-2][1]}")
    assert again.id not in asked
    assert read_entries(registry.entries()).ok


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("keys", ["here", "elsewhere"])
def test_a_disk_that_is_really_full(small_disk, tmp_path, keys):
    """Database, write-ahead log and (or) keys share a disk that fills."""
    place = Place(str(small_disk / "registry.db"), small_disk if keys == "here" else tmp_path)
    registry = place.open()
    asked = {}

    def fill():
        for at in range(5000):
            asked[f"k{at}"] = registry.request(f"k{at}", person(f"Person Number{at}"), "x" * 4000).id

    with pytest.raises(LedgerFailed) as caught:
        fill()
    assert len(asked) > 5
    assert "disk is full" in str(caught.value) or "key could not be written" in str(caught.value)
    for name in ("k0", "k1"):
        assert registry.request(name, person(f"Person Number{name[1:]}"), "x" * 4000).id == asked[name], "reading goes on"
    registry.close()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    again = place.open()
    assert {t.id for t in again.active()} == set(asked.values())
    assert read_entries(again.entries()).ok
    late = f"k{len(asked)}"
    assert again.request(late, person("Late Comer")).id not in asked.values()


def test_a_database_that_comes_back_is_used_again(cluster, tmp_path):
    place = Place(cluster.make(), tmp_path)
    registry = place.open()
    first = registry.request("a", person("Alice Able"))
    cluster.control("-m", "immediate", "stop")
    with pytest.raises(LedgerFailed):
        registry.request("b", person("Bob Baker"))
    cluster.start()
    assert [t.id for t in registry.active()] == [first.id]
    registry.request("b", person("Bob Baker"))
    assert words(registry) == {"Alice Able", "Bob Baker"}


def test_errors_do_not_quote_what_was_asked(local):
    registry = local.open()
    with registry._db.write() as connection:
        connection.execute(sql.text("ALTER TABLE expunge_targets RENAME COLUMN sealed TO other"))
    with pytest.raises(LedgerFailed) as caught:
        registry.request("Jane's key", JANE, "secret reason")
    assert not [w for w in ("Jane", "Quick", "secret") if w in str(caught.value)]
    inner = caught.value.__context__
    assert inner is not None
    assert "hide_parameters" in str(inner), "not even what the library says, should somebody print it"
    assert caught.value.__suppress_context__
