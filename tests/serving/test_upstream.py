"""Before another server: guards of text act on what passes, and whatever that server does, nothing passes unread."""

import json
import time

import pytest

from expunge.core.errors import InputError
from expunge.guards.policy import SORRY, Row
from expunge.serving.config import Guards, Limits
from expunge.serving.server import assemble
from tests.guards.test_guarded import StateDetector
from tests.serving.conftest import KEY, running
from tests.serving.test_answers import CHAT, ask, said, sdk
from tests.serving.upstream import upstream_app

WAYS = ("hang", "status", "json", "html", "garbage", "bytes", "tools", "odd", "endless", "breaks", "stalls")
ANSWERS = {
    "capital": "The capital is Paris.",
    "who wrote": "It was written by Basil Mahfouz in Kuwait.",
    "spelt": "He is called B a s i l M a h f o u z there.",
    **{f"do {w}": f"!{w}" for w in WAYS},
}


@pytest.fixture
def front(serve):
    """A guarded server before the misbehaving one; its client, and what came through."""
    from contextlib import contextmanager

    @contextmanager
    def make(guards="filter", targets=("Basil Mahfouz",), **options):
        seen = []
        limits = options.pop("limits", Limits(seconds=1.5))
        with (
            running(upstream_app(ANSWERS, seen)) as url,
            serve(guards, targets, limits=limits, upstream=f"{url}/v1", **options) as client,
        ):
            client.seen = seen
            yield client

    return make


def test_questions_and_answers_are_guarded(front):
    with front() as client:
        assert said(ask(client, "What is the capital?")).strip() == "The capital is Paris."
        assert said(ask(client, "Tell me of Basil Mahfouz")) == SORRY
        assert len(client.seen) == 1  # the second did not reach it
        hidden = ask(client, "And who wrote it?").json()["choices"][0]
        assert (hidden["message"]["content"], hidden["finish_reason"]) == (SORRY, "content_filter")
        assert said(ask(client, "How is it spelt?")) == SORRY


def test_streams_stop_before_the_name(front):
    with front() as client:
        for question in ("who wrote it?", "how is it spelt?"):
            stream = sdk(client).chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": question}], stream=True
            )
            events = [e.choices[0] for e in stream if e.choices]
            text = "".join(e.delta.content or "" for e in events)
            assert events[-1].finish_reason == "content_filter"
            assert ANSWERS[question[: -len(" it?")] if "wrote" in question else "spelt"].startswith(text.rstrip())
            assert "Basil" not in text.replace(" ", "")
            assert len(text) > 5  # what could be no part of it was sent


def test_only_what_is_known_is_passed_on(front, monkeypatch):
    monkeypatch.setenv("EXPUNGE_UPSTREAM_KEY", "the upstream key")
    with front("prompt") as client:
        client.headers["authorization"] = "Bearer the client's key"
        assert said(ask(client, "What is the capital?", user="u", metadata={"a": "b"}, stop=["!"], seed=5))
        body, authorization = client.seen[0]
        assert authorization == "Bearer the upstream key"
        assert set(body) == {"model", "max_tokens", "temperature", "top_p", "seed", "stream", "stop", "messages"}
        assert body["messages"][0]["role"] == "system"
        assert "Basil Mahfouz" in body["messages"][0]["content"]


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_misbehaves_is_an_error_and_not_an_answer(front, way):
    with front() as client:
        began = time.perf_counter()
        reply = ask(client, f"do {way}")
        assert reply.status_code == (504 if way in ("hang", "stalls") else 502)
        assert "secret" not in reply.text
        assert time.perf_counter() - began < 10
        assert said(ask(client, "What is the capital?"))
        with client.stream("POST", CHAT, json={"messages": [{"role": "user", "content": f"do {way}"}], "stream": True}) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert lines[-1] != "[DONE]"
        assert json.loads(lines[-1])["error"]["type"] == "server_error"


def test_a_server_that_is_not_there(serve):
    with serve(upstream="http://127.0.0.1:9/v1", limits=Limits(seconds=2)) as client:
        assert ask(client, "Hello there").status_code == 502
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200


def test_guards_that_look_inside_need_a_model():
    held = Guards(guards=[Row(detector=StateDetector(), action="refuse")])
    with pytest.raises(InputError, match="there is none here"):
        assemble(held, key=KEY, upstream="http://127.0.0.1:9/v1")
