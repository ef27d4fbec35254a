"""An auditor's questions: was it so, is it whole, was this person to be hidden then?"""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.guards.parts import Material
from expunge.guards.policy import Policy, Row
from expunge.guards.target import Target
from expunge.ledger.auditing import audit
from expunge.ledger.canonical import canonical, link, moment, read_line, sealed_line, stamp
from expunge.ledger.keys import KeyStore, MasterKey, Signer, opened, sealed
from expunge.ledger.periods import end_of, normal, period_of
from expunge.ledger.protection import protection, read_entries
from expunge.ledger.registry import Registry
from tests.ledger.logs import Desk, ask

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)


@pytest.fixture
def case(tmp_path):
    """A day: Jane is hidden from noon, Omar from one until two; Ida until her time is over."""
    at = [NOON]
    desk = Desk(tmp_path / "log")
    registry = Registry(tmp_path / "r.db", desk.keys, clock=lambda: at[0])
    log = desk.open({"checkpoint_every": 3}, clock=lambda: at[0], anchor=lambda: {"registry": "{}:{}".format(*registry.head())})

    def serve(text):
        policy = Policy([Row(detector="terms", action="refuse")], Material(targets=registry.active(), key=b"k" * 32))
        log.policy(policy.digest(), policy.targets)
        ask(log, policy, text)

    jane = registry.request("j", Target(entities=("Jane Quickfinger",)), basis="erasure")
    ida = registry.request("i", Target(entities=("Ida Shortstay",)), until=NOON + timedelta(minutes=30))
    serve("Who is Jane Quickfinger?")
    at[0] += timedelta(hours=1)
    omar = registry.request("o", Target(entities=("Omar Longshanks",)))
    serve("Who is Omar Longshanks?")
    at[0] += timedelta(hours=1)
    registry.expire()
    registry.withdraw(omar.id)
    serve("Who is Omar Longshanks?")
    log.close()
    registry.export(tmp_path / "ledger.jsonl")
    return desk, log, tmp_path / "ledger.jsonl", {"jane": jane.id, "omar": omar.id, "ida": ida.id}


def audited(case, **questions):
    desk, _, ledger, _ = case
    return audit(desk.folder, desk.base / "sign.pem.pub", desk.checkpoints, ledger=ledger, **questions)


@pytest.mark.parametrize(
    ("who", "minutes", "hidden", "why"),
    [
        ("jane", -1, False, "only later"), ("jane", 0, True, "had not ended"), ("jane", 10_000, True, "had not ended"),
        ("omar", 59, False, "only later"), ("omar", 60, True, "had not ended"), ("omar", 119, True, "had not ended"),
        ("omar", 120, False, "withdrawn"), ("ida", 29, True, "had not ended"), ("ida", 30, False, "expired"),
        ("ida", 600, False, "expired"),
    ],
)  # fmt: skip
def test_whether_a_target_was_to_be_hidden(case, who, minutes, hidden, why):
    found = audited(case, target=case[3][who], at=NOON + timedelta(minutes=minutes))
    assert found.report.ok
    assert found.protection.protected is hidden
    assert why in found.protection.why
    assert found.exit_code == (0 if hidden else 3)


def test_an_unknown_target_was_never_hidden(case):
    found = audited(case, target="0" * 16, at=NOON)
    assert not found.protection.protected
    assert found.protection.why == "It was never asked for."


def test_what_was_served_is_told_beside_what_was_to_be(case):
    found = audited(case, target=case[3]["omar"], at=NOON + timedelta(hours=1, minutes=2))
    assert (found.service.requests, found.service.guarded, found.service.fired) == (1, 1, 1)
    after = audited(case, target=case[3]["omar"], at=NOON + timedelta(hours=2))
    assert (after.service.requests, after.service.guarded, after.service.fired) == (1, 0, 0)
    assert any("of 1 requests around then, 1 were decided with it hidden" in line for line in found.lines())


def test_a_disputed_text_is_shown_in_its_records(case):
    keys = {n: case[1].periods.export(n) for n in case[1].periods.names()}
    found = audited(case, text="who is OMAR Longshanks?", keys=keys)
    assert [f.record["outcome"] for f in found.found] == ["refused", "passed"]
    assert found.exit_code == 0
    assert "the text stands in 2 records" in found.lines()
    said = json.dumps(found.described())
    assert '"ok": true' in said
    assert "Omar" not in said
    nothing = audited(case, text="Who is Nobody?", keys=keys)
    assert nothing.exit_code == 3


def test_a_changed_ledger_is_reported(case, tmp_path):
    lines = case[2].read_bytes().splitlines(keepends=True)
    case[2].write_bytes(b"".join(lines[:1] + lines[2:]))
    found = audited(case)
    assert found.exit_code == 3
    assert any("PROBLEM ledger.jsonl:2: record 2 is not there (gap)" in line for line in found.lines())


def test_every_byte_of_a_ledger_counts(case):
    lines = case[2].read_bytes()
    for at in range(len(lines)):
        changed = bytearray(lines)
        changed[at] ^= 1 + at % 255
        assert not read_entries(bytes(changed).splitlines(keepends=True)).ok, at


@pytest.mark.parametrize(
    ("questions", "said"),
    [({"text": "x"}, "keys of periods"), ({"target": "x"}, "needs its id, a time"),
     ({"text": "x", "keys": {"2026-11-28": "zz"}}, "hexadecimal")],
)  # fmt: skip
def test_incomplete_questions_are_refused(case, questions, said):
    with pytest.raises(InputError, match=said):
        audited(case, **questions)


# -- the small parts ------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
json_records = st.dictionaries(st.text(max_size=6).filter(lambda k: k != "hash"), json_values, max_size=5)


@settings(max_examples=200, deadline=None)
@given(record=json_records, before=st.binary(min_size=32, max_size=32))
def test_a_line_gives_its_record_back(record, before):
    line, digest = sealed_line(before.hex(), record)
    assert line.count(b"\n") == 1
    read, found = read_line(line)
    assert canonical(read) == canonical(record)
    assert found == digest == link(before.hex(), read)
    assert link("0" * 64, record) != digest or before == b"\0" * 32


@settings(max_examples=300, deadline=None)
@given(record=json_records, data=st.data())
def test_no_byte_of_a_line_is_free(record, data):
    line, _ = sealed_line("0" * 64, record)
    changed = bytearray(line)
    changed[data.draw(st.integers(0, len(line) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        read, found = read_line(bytes(changed))
    except (ValueError, RecursionError):
        return
    assert link("0" * 64, read) != found


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), bound=st.binary(max_size=20), at=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_what_is_sealed_opens_whole_or_not_at_all(data, bound, at, mask):
    key = b"k" * 32
    box = sealed(key, data, bound)
    assert opened(key, box, bound) == data
    assert sealed(key, data, bound) != box
    changed = bytearray(box)
    changed[at % len(box)] ^= mask
    for args in (
        (key, bytes(changed), bound),
        (b"j" * 32, box, bound),
        (key, box, bound + b"x"),
        (key, box[:-1], bound),
        (key, b"", bound),
    ):
        with pytest.raises(ValueError, match="another key, or changed data"):
            opened(*args)


@settings(max_examples=200, deadline=None)
@given(st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(2200, 1, 1)), st.integers(-14 * 60, 14 * 60))
def test_times_sort_as_text(at, offset):
    from datetime import timezone

    there = at.replace(tzinfo=timezone(timedelta(minutes=offset)))
    assert moment(stamp(there)) == there
    assert (stamp(there) < stamp(NOON)) == (there < NOON)
    for every in ("day", "hour"):
        period = period_of(there, every)
        assert end_of(period) - timedelta(days=1 if every == "day" else 0, hours=every == "hour") <= there < end_of(period)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_a_normal_text_is_its_own_normal_form(text):
    assert normal(normal(text)) == normal(text)
    assert normal(f"  {text}\n") == normal(text)


def test_keys_are_made_once_whoever_asks(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    stores = [KeyStore(tmp_path / "keys", MasterKey(b"m" * 32)) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for name in ("a", "b", "c"):
            made = set(pool.map(lambda at, name=name: stores[at % 4].make(name), range(16)))
            assert len(made) == 1
    assert list(stores[0].names()) == ["a", "b", "c"]
    assert list(stores[0].names("b")) == ["b"]
    with pytest.raises(ValueError, match="no name"):
        stores[0].make("../x")
    (tmp_path / "keys" / "a.key").write_bytes((tmp_path / "keys" / "b.key").read_bytes())
    with pytest.raises(InputError, match="does not open"):
        stores[0].get("a")


def test_master_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    first = MasterKey.from_file(tmp_path / "m")
    assert MasterKey.from_file(tmp_path / "m").unwrap(first.wrap(b"x", "n"), "n") == b"x"
    assert repr(first) == "MasterKey(...)"
    monkeypatch.setenv("EXPUNGE_MASTER_KEY", (tmp_path / "m").read_text())
    assert MasterKey.from_environment().unwrap(first.wrap(b"x", "n"), "n") == b"x"
    for text, said in (("", "not set"), ("###", "no key"), ("QUJD", "3 bytes")):
        monkeypatch.setenv("EXPUNGE_MASTER_KEY", text)
        with pytest.raises(InputError, match=said):
            MasterKey.from_environment()
    with pytest.raises(InputError, match="no private"):
        Signer(tmp_path / "m")


def test_protection_needs_the_words_of_no_target(case):
    entries = read_entries(case[2].read_bytes().splitlines(keepends=True))
    assert protection(entries, case[3]["jane"], NOON).entries == (1,)
    assert not [w for w in (b"Jane", b"Quick", b"Omar") if w in case[2].read_bytes()]
