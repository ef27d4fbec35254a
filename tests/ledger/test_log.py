"""The log holds what happened to each request, and not a word of what was said."""

import base64
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Answer
from expunge.guards.policy import Policy
from expunge.ledger.errors import LedgerFailed, Shredded
from expunge.ledger.records import Request, Versions
from expunge.ledger.verify import decided_again, find, seed_holds, served
from tests.ledger.logs import JANE, OMAR, Desk, a_policy, ask, filled, kinds, requests

ROOT = Path(__file__).resolve().parents[2]


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
