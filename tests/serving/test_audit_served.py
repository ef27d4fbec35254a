"""What is only served is audited over real HTTP, beside local models, by answers in words."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal

import pytest
from fastapi import Request

from expunge.adapters.endpoint import KEY, Asker, Endpoint, Unanswered
from expunge.adapters.served import ServedAdapter
from expunge.audit.settings import AuditSettings
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Verdict
from expunge.guards.policy import SORRY
from expunge.pipeline import served_audit
from expunge.pipeline.served_audit import ANSWERS, ServedConfig
from expunge.serving.config import Limits
from tests.adapters.test_endpoint import Script
from tests.command import cold, expunge, server, start, stop_when
from tests.guards.conftest import name_of
from tests.serving.conftest import running

__all__ = ["expunge", "server"]
LIGHT = {"draws": 100, "samples_forget": 2, "samples_retain": 1}
LIMITS = Limits(tokens=24)


@pytest.fixture(scope="module")
def place(tmp_path_factory, people_world):
    """Records, the target and three retrained models, in files."""
    folder = tmp_path_factory.mktemp("served")
    split = people_world.split
    for name, records in (("forget", split.forget), ("retain", split.retain[:30]), ("holdout", split.holdout[:12])):
        lines = [json.dumps({"id": r.id, "prompt": r.prompt, "answer": r.answer, "subject": r.subject}) for r in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    people_world.target().save(folder / "target")
    for seed in (1, 2, 3):
        people_world.retrained(seed).save(folder / f"retrained-{seed}")
    return folder


@pytest.fixture(scope="module")
def names(people_world):
    """Names of the people to forget."""
    return sorted({name_of(r) for r in people_world.split.forget})


def config(place, client, **served):
    gold = tuple(str(place / f"retrained-{s}") for s in (1, 2, 3))
    return ServedConfig(
        served={"url": f"{client.base_url}/v1", "model": "tiny", "pause": 0.01, **served}, target=str(place / "target"),
        forget=str(place / "forget.jsonl"), retain=str(place / "retain.jsonl"), holdout=str(place / "holdout.jsonl"),
        audit={"retrained": gold, "settings": AuditSettings(**LIGHT)},
    )  # fmt: skip


def audited(place, client, out, **served):
    return served_audit.audit_served(served_audit.plan(config(place, client, **served), out))


def judged(document, label="served"):
    return document.entry(label).judgement


def test_a_served_filter_is_suppressed_and_its_refusals_are_counted(serve, place, people, names, tmp_path):
    with serve(targets=names) as client:
        document = audited(place, client, tmp_path / "run")
    found = judged(document)
    assert found.verdict is Verdict.SUPPRESSED
    assert "kept from answering, and what stands behind is not shown" in found.reason
    assert "100% of the forget prompts are answered in the model's place" in found.reason
    assert judged(document, "target").verdict is Verdict.NOT_FORGOTTEN
    numbers = document.entry("served").numbers
    assert {n: numbers[f"{n}.refused"].value for n in ("forget", "retain", "holdout")} == {"forget": 1, "retain": 0, "holdout": 0}
    sample = next(s for s in document.samples if s.set == "forget")
    assert sample.answers["served"] == SORRY
    assert sample.answers["target"] != SORRY
    assert document.protocol["access"] == "text"
    assert any("while this audit ran" in s for s in document.not_shown)
    assert not any("put twice" in s or "changed while" in s for s in document.not_shown)
    assert document.entry("served").path == f"{client.base_url}/v1"


def test_the_bare_target_is_found_out_though_nothing_but_its_words_is_had(serve, place, people, tmp_path):
    with serve(targets=[]) as client:
        document = audited(place, client, tmp_path / "run")
    assert judged(document).verdict is Verdict.NOT_FORGOTTEN
    assert document.entry("served").numbers["forget.refused"].value == 0
    both = [document.entry(n).numbers["forget.rouge-l-recall"].value for n in ("served", "target")]
    assert both[0] == both[1]


def test_a_way_of_asking_that_does_not_fit_the_server_is_said_and_the_audit_goes_on(serve, place, tmp_path):
    with serve(targets=[]) as client:
        held = config(place, client)
        settings = AuditSettings(**{**LIGHT, "attacks": ("many-people",)})
        held = held.model_copy(update={"audit": held.audit.model_copy(update={"settings": settings})})
        document = served_audit.audit_served(served_audit.plan(held, tmp_path / "run"))
    assert any("longer than the server takes" in s for s in document.not_shown)
    assert judged(document).verdict is Verdict.NOT_FORGOTTEN
    assert document.entry("served").numbers["forget.many-people"].value == 0


def test_a_filter_that_tells_no_client_is_known_by_its_words(serve, place, names, tmp_path):
    with serve(targets=names, tell=False) as client:
        blind = audited(place, client, tmp_path / "blind")
        told = audited(place, client, tmp_path / "told", refusals=(SORRY,))
    assert blind.entry("served").numbers["forget.refused"].value == 0
    assert judged(blind).verdict is not Verdict.FORGOTTEN
    assert judged(told).verdict is Verdict.SUPPRESSED


def test_a_limit_of_requests_is_kept_to(serve, place, tmp_path, target_adapter, people):
    with serve(targets=[], limits=Limits(tokens=24, rate=2.0)) as client:
        asker = Asker(Endpoint(url=f"{client.base_url}/v1", model="tiny", parallel=8, pause=0.01))
        adapter = ServedAdapter(asker, target_adapter.tokenizer)
        records = list(people.split.retain[:26])  # six more than the burst
        found = adapter.generate(adapter.model, [adapter.encode(r) for r in records], 24)
        asker.close()
    own = target_adapter.generate(target_adapter.model, [target_adapter.encode(r) for r in records], 24)
    assert [(g.id, g.text) for g in found] == [(g.id, g.text) for g in own]


def test_an_audit_that_was_broken_off_goes_on_and_one_that_is_done_asks_nothing(serve, place, tmp_path, monkeypatch):
    out = tmp_path / "run"
    put, count = Asker._put, [0]

    def breaking(self, route, body):
        count[0] += 1
        if count[0] == 20:
            raise Unanswered("The server went away.")
        return put(self, route, body)

    with serve(targets=[]) as client:
        held = config(place, client, parallel=1)
        monkeypatch.setattr(Asker, "_put", breaking)
        with pytest.raises(Unanswered):
            served_audit.audit_served(served_audit.plan(held, out))
        lines = (out / ANSWERS).read_text().count('"key"')
        assert 19 <= lines < 30  # what was on its way when one failed may have come
        with pytest.raises(InputError, match="exists and is not empty"):
            served_audit.plan(held, out)
        document = served_audit.audit_served(served_audit.plan(held, out, resume=True))
        asked = count[0]
        again = served_audit.audit_served(served_audit.plan(held, out, resume=True))
    assert again == document
    assert count[0] == asked
    keys = [json.loads(x)["key"] for x in (out / ANSWERS).read_text().split("\n") if '"key"' in x]
    assert len(keys) == len(set(keys))


def test_a_served_model_offers_words_and_nothing_else(people, target_adapter, monkeypatch):
    asker = Asker(Endpoint(url="http://127.0.0.1:9/v1", model="tiny", form="completions"))
    adapter = ServedAdapter(asker, target_adapter.tokenizer)
    assert adapter.offers == {Offer.TEXT, Offer.GENERATE}
    assert not adapter.lasting
    record = people.split.forget[0]
    example, own = adapter.encode(record), target_adapter.encode(record)
    assert example.n_targets == own.n_targets
    assert adapter._question(example) == ("completions", {"prompt": f"Question: {record.prompt}\nAnswer:"})
    batch = adapter.collate([example])
    for ask in (
        lambda: adapter.forward(adapter.model, batch, frozenset({"losses"})), lambda: adapter.logit_blocks(adapter.model, batch),
        adapter.copy, lambda: adapter.save("x"), lambda: adapter.sample(adapter.model, [example], 4, 1.0),
    ):  # fmt: skip
        with pytest.raises(InputError, match="can only be asked"):
            ask()
    assert adapter.fingerprint() != ServedAdapter(Asker(asker.endpoint), target_adapter.tokenizer).fingerprint()
    asker.close()


def test_a_server_draws_by_itself_from_seeds_that_follow_from_the_numbers(serve, people, target_adapter, tmp_path):
    from expunge.audit.generations import sampled
    from expunge.audit.store import ScoreStore

    store = ScoreStore(tmp_path / "scores")
    with serve(targets=[]) as client:
        found = []
        for _ in range(2):
            asker = Asker(Endpoint(url=f"{client.base_url}/v1", model="tiny"))
            adapter = ServedAdapter(asker, target_adapter.tokenizer)
            examples = [adapter.encode(r) for r in people.split.holdout[:3]]
            made = sampled(adapter, examples, 3, 16, temperature=2.0, seed=1, store=store)
            found.append([[g.text for g in group] for group in made])
            asker.close()
    assert found[0] == found[1]
    assert len({t for group in found[0] for t in group}) > 3
    assert not store.folder.exists()  # of what is only served nothing is kept beyond its run


def test_a_conversation_is_sent_turn_by_turn(people, target_adapter):
    from dataclasses import replace

    asker = Asker(Endpoint(url="http://127.0.0.1:9/v1", model="tiny"))
    adapter = ServedAdapter(asker, target_adapter.tokenizer)
    turns = (("system", "Be brief."), ("user", "Hello?"), ("assistant", "Hello."), ("user", "Who?"))
    record = replace(people.split.forget[0], prompt="", messages=turns)
    assert adapter._question(adapter.encode(record)) == (
        "chat/completions", {"messages": [{"role": r, "content": t} for r, t in turns]},
    )  # fmt: skip
    asker.close()


# ---- by the command line


def words(place, url, *more):
    gold = [w for s in (1, 2, 3) for w in ("--retrained", place / f"retrained-{s}")]
    data = ("--target", place / "target", "--forget", place / "forget.jsonl", "--retain", place / "retain.jsonl")
    return ("audit", "--served", f"{url}/v1", *data, *gold, *more)


def test_the_command_audits_what_is_served_and_reports_it(serve, keys, place, names, expunge):
    access, asks, _, _ = keys
    with serve(targets=names, access=access) as client:
        url = str(client.base_url)
        shutil.rmtree(place / "run", ignore_errors=True)
        more = ("--model-name", "tiny", "--out", place / "run", "draws=100", "served.parallel=4", "attacks=role-play,prune")
        dry = expunge(*words(place, url, *more), "--dry-run", "--json", **{KEY: asks})
        assert dry.code == 0, dry.err
        assert dry.json()["cost"] == {"models": 5, "questions": 60}
        assert not (place / "run").exists()
        done = expunge(*words(place, url, *more), "--require", "suppressed", **{KEY: asks})
        assert done.code == 0, done.err
        assert "suppressed" in done.out
        for file in (place / "run").rglob("*"):
            assert not file.is_file() or asks not in file.read_text(errors="replace")
        assert asks not in done.out + done.err
        held = json.loads((place / "run" / "audit.json").read_text())
        assert held["models"][-1]["numbers"]["forget.role-play"]["value"] < 0.05
        assert "Not tried, since it takes more than this access: prune." in held["not_shown"]
        assert expunge("report", place / "run").code == 0
        page = (place / "run" / "report.html").read_text()
        assert "Access: answers in words" in page
        for wrong, env, said in (
            (("--model-name", "tiyn"), {KEY: asks}, "Did you mean 'tiny'"),
            (("--model-name", "tiny"), {KEY: "wrong"}, f"does not accept the key in {KEY}"),
            (("--model-name", "tiny"), {}, "asks for a key"),
            (("--model-name", "tiny", "--access", "scores"), {KEY: asks}, "gives no access to scores"),
            ((), {KEY: asks}, "needs --model-name"),
            (("--model-name", "tiny", "served.paralel=2"), {KEY: asks}, "paralel"),
            (("--model-name", "tiny", "--references", "4"), {KEY: asks}, "are for runs"),
        ):
            bad = expunge(*words(place, url, *wrong, "--out", place / "bad"), **env)
            assert bad.code == 2, bad.err
            assert said in bad.err, bad.err
            assert "Traceback" not in bad.err
            assert not (place / "bad").exists()
    gone = expunge(*words(place, url, "--model-name", "tiny", "--out", place / "bad"))
    assert gone.code == 2
    assert f"Nothing answers at {url}/v1" in re.sub(r"\s+", " ", gone.err)


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on_where_it_stopped(place, tmp_path):
    class Slow(Script):
        async def asked(self, request: Request):
            await asyncio.sleep(0.1)
            return await super().asked(request)

    out, script = tmp_path / "run", Slow()
    given = ("--model-name", "tiny", "--out", out, "draws=100", "served.parallel=2", "samples_forget=0", "samples_retain=0")

    def answered():
        return (out / ANSWERS).is_file() and (out / ANSWERS).read_text().count('"key"') >= 10

    with running(script.app) as url:
        process = start(*words(place, url, *given), cwd=tmp_path)
        stop_when(process, answered, signal.SIGKILL)
        known = (out / ANSWERS).read_text().count('"key"')
        before = len(script.seen)
        done = cold(*words(place, url, *given, "--resume"), cwd=tmp_path)
    assert done.code == 0, done.err
    asked = [json.dumps(b, sort_keys=True) for b in script.seen[before:]]
    first = {json.dumps(b, sort_keys=True) for b in script.seen[:before]}
    again = [q for q in asked if q in first]
    assert known >= 10
    assert len(again) <= 1 + 2 + 8  # the word that is asked before, what was on its way, and what is put twice
    assert (out / "audit.json").is_file()


def test_options_of_what_is_served_are_for_that_alone(expunge, place):
    for given, said in (
        (("audit", "some-run", "--model-name", "tiny"), "--model-name is for what is served"),
        (("audit",), "There is nothing to audit"),
        (("audit", "some-run", "--served", "http://127.0.0.1:9/v1"), "exclude each other"),
    ):
        done = expunge(*given)
        assert done.code == 2
        assert said in re.sub(r"\s+", " ", done.err)
