"""What is kept in full can be read by the auditor and by nobody else, and goes."""

from datetime import UTC, datetime, timedelta

import pytest

from expunge.core.errors import InputError
from expunge.ledger.errors import LedgerFailed
from expunge.ledger.escrow import Escrow, make_auditor_key, open_box
from expunge.ledger.verify import records
from tests.ledger.logs import Desk, a_policy, ask


@pytest.fixture
def auditor(tmp_path):
    return make_auditor_key(tmp_path / "auditor" / "key.pem")


def boxes(escrow):
    return sorted(escrow.folder.glob("*.box"))


def test_the_auditor_reads_what_the_server_cannot(tmp_path, auditor):
    at = [datetime(2026, 11, 28, 12, tzinfo=UTC)]
    desk = Desk(tmp_path / "server")
    escrow = Escrow(desk.base / "escrow", auditor, share=1, keep=timedelta(days=2), clock=lambda: at[0])
    log, policy = desk.open(clock=lambda: at[0], escrow=escrow), a_policy()
    name = ask(log, policy, "Who is Jane Quickfinger of Timbuktu?")
    assert not [p for p in desk.base.rglob("*") if p.is_file() and b"Timbuktu" in p.read_bytes()]
    (box,) = boxes(escrow)
    held, digest = open_box(box, tmp_path / "auditor" / "key.pem")
    assert held["record"] == name
    assert held["messages"] == [["user", "Who is Jane Quickfinger of Timbuktu?"]]
    assert "can't help" in held["answer"]
    record = next(r for _, r in records(desk.folder) if r["kind"] == "request")
    assert record["escrow"] == digest
    at[0] += timedelta(days=2)
    log.destroy_old_keys()
    assert boxes(escrow) == []
    assert [r["boxes"] for _, r in records(desk.folder) if r["kind"] == "keys"] == [1]
    log.close()
    assert desk.verify().ok


def test_another_key_or_a_changed_box_opens_nothing(tmp_path, auditor):
    from expunge.guards.conversation import Conversation

    escrow = Escrow(tmp_path / "escrow", auditor, share=1, keep=timedelta(days=1))
    escrow.put("ab" * 16, Conversation.of("Who?"), None)
    (box,) = boxes(escrow)
    make_auditor_key(tmp_path / "other.pem")
    with pytest.raises(InputError, match="does not open"):
        open_box(box, tmp_path / "other.pem")
    data = box.read_bytes()
    for at in (0, 31, 32, 50, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        box.write_bytes(changed)
        with pytest.raises(InputError, match="does not open"):
            open_box(box, tmp_path / "auditor" / "key.pem")
    assert len(data) % 1024 == 32 + 12 + 16


def test_the_share_is_kept_to(tmp_path, auditor):
    escrow = Escrow(tmp_path / "escrow", auditor, share=0.25, keep=timedelta(days=1))
    drawn = sum(escrow.drawn() for _ in range(4000))
    assert 850 < drawn < 1150
    for share in (0, 1.5):
        with pytest.raises(InputError, match="share"):
            Escrow(tmp_path / "escrow", auditor, share=share, keep=timedelta(days=1))
    with pytest.raises(InputError, match="no public key"):
        Escrow(tmp_path / "escrow", tmp_path / "auditor" / "key.pem", keep=timedelta(days=1))
    with pytest.raises(InputError, match="there already"):
        make_auditor_key(tmp_path / "auditor" / "key.pem")


def test_a_request_and_its_box_are_both_kept_or_neither_is(tmp_path, auditor):
    desk = Desk(tmp_path)
    escrow = Escrow(desk.base / "escrow", auditor, share=1, keep=timedelta(days=1))
    log, policy = desk.open(escrow=escrow), a_policy()
    append = log._lines.append
    log._lines.append = lambda line: (_ for _ in ()).throw(LedgerFailed("no room", full=True))
    with pytest.raises(LedgerFailed):
        ask(log, policy, "Hello")
    assert list(escrow.folder.iterdir()) == []
    log._lines.append = append
    ask(log, policy, "Hello")
    ask(log, policy, "Hello", canary=True)
    assert len(list(escrow.folder.iterdir())) == 1, "what the server asks itself is never kept in full"
    log.close()
    assert [("escrow" in r, r.get("canary", False)) for _, r in records(desk.folder) if r["kind"] == "request"] == [
        (True, False), (False, True),
    ]  # fmt: skip
