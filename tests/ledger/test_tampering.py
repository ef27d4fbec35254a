"""Each way of changing a log is found, with the public key alone."""

import json
import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.ledger.canonical import GENESIS, canonical, read_line, sealed_line
from expunge.ledger.keys import Public, Signer
from expunge.ledger.protection import read_entries
from expunge.ledger.registry import Registry
from expunge.ledger.verify import verify
from tests.ledger.logs import Desk, filled


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("log"), 8)[0]


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("rotated"), 20, {"rotate_bytes": 4096})[0]


@pytest.fixture
def desk(original, tmp_path):
    return original.copy(tmp_path / "copy")


def codes(desk, **options):
    return {p.code for p in desk.verify(**options).problems}


def test_an_untouched_log_holds(original, rotated):
    for desk in (original, rotated):
        report = desk.verify()
        assert report.ok
        assert report.exit_code == 0
        assert report.uncovered == 0
        assert report.lines()[-1] == "the log holds"
    assert rotated.verify().files > 2


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_byte_counts(desk, original, place, mask):
    path = desk.folder / "log-000001.jsonl"
    changed = bytearray((original.folder / path.name).read_bytes())
    changed[int(place * len(changed))] ^= mask
    path.write_bytes(changed)
    assert not desk.verify().ok


@pytest.mark.slow
def test_every_byte_counts(tmp_path):
    desk, _ = filled(tmp_path, 1)
    each_byte(desk, desk.folder / "log-000001.jsonl")


def each_byte(desk, path):
    dice, data, public = random.Random(1), path.read_bytes(), desk.signer.public
    assert verify(desk.folder, public, desk.checkpoints).ok
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= dice.randrange(1, 256)
        path.write_bytes(changed)
        assert not verify(desk.folder, public, desk.checkpoints).ok, f"byte {at} of {len(data)}"


def test_every_byte_of_the_checkpoints_counts(tmp_path):
    desk, _ = filled(tmp_path, 1)
    each_byte(desk, desk.checkpoints)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_other_bytes_hold(desk, original, data):
    """Whatever lines are left out, doubled, moved, cut or joined."""
    lines = original.lines()
    places = data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=1, max_size=len(lines) + 2))
    made = b"".join(lines[i] for i in places)
    made = made[: data.draw(st.integers(max(0, len(made) - 80), len(made)))] if data.draw(st.booleans()) else made
    if made == b"".join(lines):
        return
    (desk.folder / "log-000001.jsonl").write_bytes(made)
    assert not desk.verify().ok


@pytest.mark.parametrize("at", range(12))
def test_a_line_that_is_gone(desk, at):
    lines = desk.lines()
    desk.put(lines[:at] + lines[at + 1 :])
    assert codes(desk) & {"gap", "truncated", "unreadable", "unsigned"}


@pytest.mark.parametrize("at", range(1, 11))
def test_lines_that_changed_places(desk, at):
    lines = desk.lines()
    lines[at], lines[at + 1] = lines[at + 1], lines[at]
    desk.put(lines)
    assert "order" in codes(desk)
    assert "edited" not in codes(desk), "each is what it was"


def test_a_line_that_stands_twice(desk):
    lines = desk.lines()
    desk.put([*lines[:5], lines[4], *lines[5:]])
    assert codes(desk) == {"order"}


def test_an_edit_is_found_where_it_is(desk):
    lines = desk.lines()
    lines[4] = lines[4].replace(b'"refused"', b'"passed"')
    desk.put(lines)
    assert [(p.code, p.where) for p in desk.verify().problems] == [("edited", "log-000001.jsonl:5")]
    assert desk.verify().exit_code == 3
    assert desk.verify().lines()[-1] == "THE LOG DOES NOT HOLD"


@pytest.mark.parametrize("kept", range(12))
def test_a_log_that_was_cut(desk, kept):
    desk.put(desk.lines()[:kept])
    assert codes(desk) & {"truncated", "incomplete"}


def forged(lines, change, begin):
    """The chain made anew from a record on, as who holds the log and knows the rule can."""
    out, before = [], GENESIS
    for at, line in enumerate(lines):
        record, digest = read_line(line)
        made, before = sealed_line(before, change(record)) if at >= begin else (line, digest)
        out.append(made)
    return out


@pytest.mark.parametrize("begin", range(2, 11))
def test_a_chain_that_was_made_anew(desk, begin):
    desk.put(forged(desk.lines(), lambda r: {**r, "outcome": "passed"}, begin))
    assert codes(desk) >= {"rewritten"}


def test_a_log_made_anew_with_a_key_of_ones_own(original, desk, tmp_path):
    other = filled(tmp_path / "other", 8)[0]
    shutil.rmtree(desk.folder)
    shutil.copytree(other.folder, desk.folder)
    assert codes(desk) == {"foreign", "unsigned"}
    shutil.copy(other.checkpoints, desk.checkpoints)
    assert codes(desk) == {"signature", "unsigned"}
    assert verify(desk.folder, other.signer.public, desk.checkpoints).ok


def test_checkpoints_that_are_gone(desk):
    lines = desk.checkpoints.read_bytes().splitlines(keepends=True)
    for at in range(len(lines)):
        desk.checkpoints.write_bytes(b"".join(lines[:at] + lines[at + 1 :]))
        assert codes(desk) & {"signature", "unsigned"}, at
    desk.checkpoints.unlink()
    assert codes(desk) == {"unsigned"}


def test_a_checkpoint_signed_by_another(desk, tmp_path):
    lines = desk.checkpoints.read_bytes().splitlines(keepends=True)
    said = json.loads(lines[1])
    del said["signature"]
    said["n"] += 0
    other = Signer(tmp_path / "mallory.pem")
    made = canonical({**said, "signature": other.sign(b"expunge checkpoint 1\0" + canonical(said))}) + b"\n"
    desk.checkpoints.write_bytes(lines[0] + made + b"".join(lines[2:]))
    assert "signature" in codes(desk)


def test_two_stories_signed_by_one_key_do_not_mix(original, tmp_path):
    """A server that has told one story and then another has checkpoints of equal numbers that do not follow from each other."""
    desks = []
    for name in ("one", "two"):
        copy = original.copy(tmp_path / name)
        for _ in range(2):
            log = copy.open()
            log.event("note")
            log.close()
        desks.append(copy)
        assert copy.verify().ok
    one, two = (d.checkpoints.read_bytes().splitlines(keepends=True) for d in desks)
    assert len(one) == len(two)
    desks[0].checkpoints.write_bytes(b"".join([*one[:-2], two[-2], one[-1]]))
    assert codes(desks[0]) >= {"signature", "rewritten"}


RESPELT = {
    "spaces": (b'":', b'": '), "a number": (b'"score":1.0', b'"score":1e0'), "an escape": (b'"refused"', b'"\\u0072efused"'),
    "a key twice": (b'{"answer_tokens"', b'{"n":1,"answer_tokens"'), "an end": (b"}\n", b"} \n"), "a return": (b"}\n", b"}\r\n"),
    "big letters": (b'"hash":"', b'"HASH":"'),
}  # fmt: skip


@pytest.mark.parametrize("what", RESPELT)
def test_a_record_that_is_spelt_otherwise_is_another(desk, what):
    lines = desk.lines()
    assert RESPELT[what][0] in lines[4]
    lines[4] = lines[4].replace(*RESPELT[what])
    desk.put(lines)
    assert [(p.code, p.where) for p in desk.verify().problems if p.code == "unreadable"] == [("unreadable", "log-000001.jsonl:5")]


def test_what_is_not_signed_yet_is_said(tmp_path):
    desk, log = filled(tmp_path, 8, {"checkpoint_every": 100}, close=False)
    report = desk.verify()
    assert report.ok
    assert (report.covered, report.uncovered) == (2, 9)
    assert "9 after it are not" in report.lines()[1]
    log.close()
    assert desk.verify().uncovered == 0


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_a_file_that_is_gone(rotated, tmp_path, gone):
    desk = rotated.copy(tmp_path / "copy")
    (desk.folder / f"log-{gone:06d}.jsonl").unlink()
    assert codes(desk) >= {"missing", "gap"}


def test_the_last_file_that_is_gone(rotated, tmp_path):
    desk = rotated.copy(tmp_path / "copy")
    sorted(desk.folder.glob("log-*.jsonl"))[-1].unlink()
    assert "truncated" in codes(desk)


def test_files_that_changed_names(rotated, tmp_path):
    desk = rotated.copy(tmp_path / "copy")
    a, b = (desk.folder / f"log-{at:06d}.jsonl" for at in (2, 3))
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    assert codes(desk) >= {"foreign", "gap"}


def test_later_files_can_be_checked_alone_if_that_is_asked_for(rotated, tmp_path):
    desk = rotated.copy(tmp_path / "copy")
    (desk.folder / "log-000001.jsonl").unlink()
    assert not desk.verify().ok
    assert desk.verify(first=2).ok, desk.verify(first=2).lines()
    data = (desk.folder / "log-000002.jsonl").read_bytes()
    for at in (3, 60, 150, 300, len(data) - 2):
        changed = bytearray(data)
        changed[at] ^= 1
        (desk.folder / "log-000002.jsonl").write_bytes(changed)
        assert not desk.verify(first=2).ok, at


def test_there_must_be_a_log_and_a_key(tmp_path, original):
    with pytest.raises(InputError, match="no log"):
        verify(tmp_path, original.signer.public, original.checkpoints)
    with pytest.raises(InputError, match="no public"):
        Public.read(original.base / "master.key")
    assert verify(original.folder, Public.read(original.base / "sign.pem.pub"), original.checkpoints).ok


def test_the_registry_is_held_by_the_signatures_of_the_log(tmp_path):
    from expunge.guards.target import Target

    base = tmp_path / "log"
    registry = Registry(tmp_path / "r.db", Desk(base).keys)
    for name in ("Alice Able", "Bob Baker", "Carl Cook"):
        registry.request(name, Target(entities=(name,)))
    desk, _ = filled(base, 6, anchor=lambda: {"registry": "{}:{}".format(*registry.head())})
    lines = registry.entries()
    assert desk.verify(ledger=read_entries(lines)).ok
    assert codes(desk, ledger=read_entries(lines[:2])) == {"truncated"}
    made = forged(lines, lambda e: {**e, "at": "2020-01-01T00:00:00.000000Z"}, 1)
    assert read_entries(made).ok, "the chain alone can be made anew"
    assert codes(desk, ledger=read_entries(made)) == {"rewritten"}


def test_a_log_that_is_endlessly_wrong_is_reported_shortly(desk):
    desk.put([b"nonsense\n"] * 500)
    report = desk.verify()
    assert len(report.problems) == 100
    assert report.more > 300
    assert f"and {report.more} problems more" in report.lines()
