"""Asking a server: real HTTP, and a server that misbehaves in every way it is told to."""

from __future__ import annotations

import json
import stat
import time
from contextlib import contextmanager

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from expunge.adapters.endpoint import CHAT, KEY, TEXT, Asker, Endpoint, Reply, Unanswered
from expunge.core.errors import InputError
from tests.serving.conftest import running

SECRET = "sk-very-secret-key"


def choice(text, finish="stop", **more):
    return {"choices": [{"message": {"role": "assistant", "content": text, **more}, "finish_reason": finish}], "model": "tiny"}


class Script:
    """What a server does next; each way is used once, then questions are answered by their own words."""

    def __init__(self, *ways, key=None, models=("tiny", "large"), chat=True):
        self.ways, self.key, self.models, self.chat, self.seen, self.at = list(ways), key, models, chat, [], []
        self.app = FastAPI()
        self.app.get("/v1/models")(self.listed)
        self.app.post("/v1/completions")(self.completed)
        if chat:
            self.app.post("/v1/chat/completions")(self.asked)

    def stranger(self, request):
        held = request.headers.get("authorization", "")
        if self.key is None or held == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": f"Incorrect key provided: {held.removeprefix('Bearer ')}."}}, 401)

    async def listed(self, request: Request):
        return self.stranger(request) or {"data": [{"id": m} for m in self.models]}

    async def completed(self, request: Request):
        body = await request.json()
        self.seen.append(body)
        return {"choices": [{"text": " on " + body["prompt"], "finish_reason": "length"}]}

    async def asked(self, request: Request):
        if (stranger := self.stranger(request)) is not None:
            return stranger
        body = await request.json()
        self.seen.append(body)
        self.at.append(time.monotonic())
        way = self.ways.pop(0) if self.ways else None
        if callable(way) and not isinstance(way, Response):
            return await run_in_threadpool(way)
        return way if way is not None else choice("so: " + body["messages"][-1]["content"])


@contextmanager
def asking(script, kept=None, **options):
    with running(script.app) as url:
        asker = Asker(Endpoint(**{"url": f"{url}/v1/", "model": "tiny", "pause": 0.01, **options}), kept)
        try:
            yield asker
        finally:
            asker.close()


def questions(*texts):
    return [(CHAT, {"messages": [{"role": "user", "content": t}]}) for t in texts]


def test_many_questions_are_answered_in_order_at_temperature_0_and_no_score_is_asked_for(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    script = Script(*[lambda: time.sleep(0.05) or choice("late")] * 1, key=SECRET)
    with asking(script, parallel=4) as asker:
        found = asker.ask(questions(*"abcdefgh"), 7)
        assert sorted(r.text for r in found)[0] == "late"
        assert [r.text for r in found if r.text != "late"] == [
            f"so: {c}" for c, r in zip("abcdefgh", found, strict=True) if r.text != "late"
        ]
        again = asker.ask(questions(*"abcdefgh"), 7)
    assert again == found
    assert len(script.seen) == 8  # each question is put once
    for body in script.seen:
        assert body["temperature"] == 0
        assert body["max_tokens"] == 7
        assert body["model"] == "tiny"
        assert not any("logprobs" in k for k in body)


def test_a_text_goes_on_by_the_other_route_and_a_limit_is_no_end():
    with asking(Script()) as asker:
        assert asker.ask([(TEXT, {"prompt": "once"})], 3) == [Reply("on once", False, False)]


def busy(seconds):
    return JSONResponse({"error": {"message": "slow down"}}, 429, headers={"retry-after": str(seconds)})


def test_a_server_that_asks_for_patience_gets_it_from_all():
    script = Script(busy(1), busy(0))
    with asking(script, parallel=2) as asker:
        began = time.monotonic()
        found = asker.ask(questions("a", "b", "c"), 5)
    assert [r.text for r in found] == ["so: a", "so: b", "so: c"]
    assert time.monotonic() - began >= 1
    assert min(t for t in script.at[2:]) - began >= 0.95  # nobody asks before the time that the server named


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (lambda: Response("<html>hidden words of a proxy</html>", media_type="text/html"), "gave no sound answer"),
        (lambda: {"choices": []}, "gave no sound answer"),
        (lambda: choice(5), "gave no sound answer"),
        (lambda: JSONResponse({"error": {"message": "hidden words"}}, 500), r"failed \(status 500\)"),
        (lambda: busy(0), r"takes no more requests now \(status 429\)"),
        (lambda: time.sleep(1) or choice("late"), "did not answer within 0.3 seconds"),
    ],
)
def test_what_fails_once_is_asked_again_and_what_fails_always_is_said_in_one_sentence(way, said):
    with asking(Script(way), seconds=0.3) as asker:
        assert asker.ask(questions("a"), 5)[0].text == "so: a"
    with asking(Script(way, way), seconds=0.3, attempts=2) as asker, pytest.raises(Unanswered, match=said) as error:
        asker.ask(questions("a"), 5)
    assert "after 2 attempts." in error.value.message
    assert "hidden words" not in str(error.value)
    assert "--resume" in error.value.remedy


def test_what_answers_in_the_models_place_is_told_apart():
    blocked = JSONResponse({"error": {"message": "policy", "code": "content_filter"}}, 400)
    ways = [choice("Sorry.", "content_filter"), choice(None, refusal="I must not."), blocked, choice("I cannot help.")]
    with asking(Script(*ways), parallel=1, refusals=["I cannot help."]) as asker:
        found = [asker.ask(questions(q), 5)[0] for q in "abcde"]
    assert [(r.text, r.refused) for r in found] == [
        ("Sorry.", True), ("I must not.", True), ("", True), ("I cannot help.", True), ("so: e", False),
    ]  # fmt: skip


def test_a_run_that_was_killed_goes_on_where_it_stopped_and_no_other_run_reads_its_answers(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    kept = tmp_path / "answers.jsonl"
    script = Script(key=SECRET)
    with asking(script, kept) as asker:
        asker.ask(questions("a", "b"), 5)
        name, url = asker.run, asker.endpoint.url
        with kept.open("a") as file:
            file.write('{"key": "half a li')  # killed in the middle of a line
        second = Asker(asker.endpoint, kept)
        try:
            assert second.run == name
            assert [r.text for r in second.ask(questions("a", "b", "c"), 5)] == ["so: a", "so: b", "so: c"]
            assert [b["messages"][0]["content"] for b in script.seen[2:]] == ["c"]
        finally:
            second.close()
        third = Asker(asker.endpoint, kept)
        assert len(third.ask(questions("a", "b", "c"), 5)) == 3
        third.close()
        assert len(script.seen) == 3
        other = Asker(asker.endpoint)
        assert other.run != name
        other.close()
        with pytest.raises(InputError, match="is not of the model"):
            Asker(Endpoint(url=url, model="large"), kept)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert SECRET not in kept.read_text()


def test_a_failure_keeps_what_was_answered(tmp_path):
    kept = tmp_path / "answers.jsonl"
    script = Script(None, None, lambda: JSONResponse({"error": {"message": "no such option"}}, 400))
    with asking(script, kept, parallel=1) as asker:
        with pytest.raises(Unanswered, match=r"does not take the request \(status 400\): no such option"):
            asker.ask(questions("a", "b", "c", "d"), 5)
        assert [r.text for r in asker.ask(questions("a", "b", "c", "d"), 5)] == ["so: a", "so: b", "so: c", "so: d"]
    lines = [json.loads(x) for x in kept.read_text().split("\n") if x]
    assert len(lines) == 5
    asked = [b["messages"][0]["content"] for b in script.seen]
    assert asked.count("a") == asked.count("b") == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"message": "This model's maximum context length is 512 tokens."}), (413, {"message": "Too large."}),
        (400, {"message": "no", "code": "context_length_exceeded"}),
    ],
)  # fmt: skip
def test_a_question_that_is_too_long_has_no_answer_and_the_others_are_asked(status, error, tmp_path):
    kept = tmp_path / "answers.jsonl"
    with asking(Script(None, lambda: JSONResponse({"error": error}, status)), kept, parallel=1) as asker:
        found = asker.ask(questions("a", "b", "c"), 5)
        assert [r.text for r in found] == ["so: a", "", "so: c"]
        assert [(r.short, r.refused) for r in found] == [(True, False), (False, False), (True, False)]
        assert asker.too_long == 1
        again = Asker(asker.endpoint, kept)
        assert again.too_long == 1
        again.close()


def test_a_model_that_changes_is_noticed():
    with asking(Script(), parallel=1) as asker:
        asker.ask(questions("a", "b", "c", "d"), 5)
        assert asker.again(2) == (2, 0)
        assert asker.said["model"] == {"tiny"}
    with asking(Script(None, None, choice("otherwise") | {"model": "tiny-2"}), parallel=1) as asker:
        asker.ask(questions("a", "b"), 5)
        assert asker.again(2) == (2, 1)
        assert asker.said["model"] == {"tiny", "tiny-2"}


# ---- what is wrong is said before any work


def refused(script, monkeypatch, key="", **options):
    monkeypatch.setenv(KEY, key)
    with asking(script, **options) as asker, pytest.raises(InputError) as error:
        asker.check()
    assert SECRET not in str(error.value)
    return error.value


def test_a_sound_server_passes_the_check(monkeypatch):
    for script, options in ((Script(), {}), (Script(), {"form": "completions"}), (Script(busy(0)), {}), (Script(models=()), {})):
        with asking(script, **options) as asker:
            asker.check()
            assert len(script.seen) == 1
            assert script.seen[0]["max_tokens"] == 1


def test_an_unknown_model_is_named_with_the_nearest(monkeypatch):
    error = refused(Script(), monkeypatch, model="tiyn")
    assert "There is no model at http://127.0.0.1" in error.message
    assert "Did you mean 'tiny'?" in error.remedy


def test_a_key_that_is_missing_or_wrong_is_said_and_never_shown(monkeypatch):
    missing = refused(Script(key="right"), monkeypatch)
    assert "asks for a key" in missing.message
    assert KEY in missing.remedy
    wrong = refused(Script(key="right"), monkeypatch, key=SECRET)
    assert f"does not accept the key in {KEY}" in wrong.message
    assert "Incorrect key provided: ***." in wrong.message
    monkeypatch.setenv("OTHER", "right")
    with asking(Script(key="right"), key_env="OTHER") as asker:
        asker.check()


def test_a_server_without_chats_is_asked_otherwise(monkeypatch):
    error = refused(Script(chat=False), monkeypatch)
    assert "has no chat/completions for the model 'tiny'" in error.message
    assert "served.form=completions" in error.remedy


def test_a_server_that_is_not_there_or_silent_or_another_one(monkeypatch):
    asker = Asker(Endpoint(url="http://127.0.0.1:9/v1", model="tiny"))
    with pytest.raises(InputError, match=r"Nothing answers at http://127\.0\.0\.1:9/v1"):
        asker.check()
    asker.close()
    silent = refused(Script(lambda: time.sleep(0.6) or choice("late")), monkeypatch, seconds=0.2)
    assert "did not answer within 0.2 seconds" in silent.message
    odd = refused(Script(lambda: Response("<html>", media_type="text/html")), monkeypatch)
    assert "no answer of a chat server" in odd.message


def test_a_key_that_others_can_read_on_the_way_is_said(monkeypatch):
    monkeypatch.setenv(KEY, f" {SECRET}\n")
    told = {}
    for url in ("http://127.0.0.1:9/v1", "https://host/v1", "http://host/v1"):
        asker = Asker(Endpoint(url=url, model="tiny"))
        told[url] = asker.notes
        asker.close()
    assert [bool(notes) for notes in told.values()] == [False, False, True]
    assert "unencrypted" in told["http://host/v1"][0]
    assert SECRET not in told["http://host/v1"][0]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:8000/v1", "begins with http"),
        ("ftp://host/v1", "begins with http"),
        ("https://user:password@host/v1", "holds no key"),
        ("https://host/v1?key=abc", "holds no key"),
        ("https://host/v1/chat/completions", "ends before /chat/completions: https://host/v1"),
    ],
)
def test_an_address_that_is_none(url, said):
    with pytest.raises(InputError, match=said):
        Endpoint(url=url, model="tiny")
