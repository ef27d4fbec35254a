"""Answers over real HTTP: the field's own client, curl, streams, and what must not be had from a guarded model."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from expunge.guards.policy import SORRY

CHAT = "/v1/chat/completions"


def ask(client, text, **more):
    return client.post(CHAT, json={"messages": [{"role": "user", "content": text}], "temperature": 0, **more})


def said(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def sdk(client, key="none"):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0)


def test_the_common_client_gets_answers_and_refusals(serve, forget, retain, target_adapter, people):
    with serve(targets=[name for _, name in forget[:1]]) as client:
        api = sdk(client)
        assert [m.id for m in api.models.list()] == ["tiny"]
        kept = api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": retain[0]}], temperature=0)
        example = target_adapter.encode(people.split.retain[0])
        assert kept.choices[0].message.content == target_adapter.generate(target_adapter.model, [example], 24)[0].text
        assert kept.choices[0].finish_reason == "stop"
        assert kept.usage.completion_tokens > 3
        assert kept.usage.prompt_tokens == example.data.start
        hidden = api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": forget[0][0]}])
        assert hidden.choices[0].message.content == SORRY
        assert hidden.choices[0].finish_reason == "content_filter"
        assert hidden.usage.completion_tokens == 0


def test_streams_give_the_same_answer_piece_by_piece(serve, forget, retain):
    with serve(targets=[forget[0][1]]) as client:
        api = sdk(client)
        for question in (retain[0], forget[0][0]):
            whole = api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": question}], temperature=0)
            events = list(
                api.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": question}], temperature=0, stream=True,
                    stream_options={"include_usage": True},
                )
            )  # fmt: skip
            pieces = [e.choices[0].delta.content or "" for e in events if e.choices]
            assert "".join(pieces) == whole.choices[0].message.content
            assert [e.choices[0].finish_reason for e in events if e.choices][-1] == whole.choices[0].finish_reason
            assert events[-1].usage == whole.usage


def test_text_is_continued(serve, retain, target_adapter, people):
    with serve() as client:
        prompt = f"Question: {retain[0]}\nAnswer:"
        done = sdk(client).completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=24)
        example = target_adapter.encode(people.split.retain[0])
        assert done.choices[0].text.strip() == target_adapter.generate(target_adapter.model, [example], 24)[0].text
        stream = sdk(client).completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=24, stream=True)
        assert "".join(e.choices[0].text for e in stream) == done.choices[0].text


def test_curl_is_served(serve, retain):
    with serve() as client:
        body = json.dumps({"messages": [{"role": "user", "content": retain[0]}], "stream": True})
        words = ["curl", "-sN", f"{client.base_url}/v1/chat/completions", "-H", "content-type: application/json", "-d", body]
        out = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
        events = [line.removeprefix("data: ") for line in out.splitlines() if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"


def test_seeds_and_stop_texts(serve, retain):
    with serve() as client:
        drawn = [said(ask(client, retain[0], temperature=2, seed=s)) for s in (1, 1, 2, 3, 4)]
        assert drawn[0] == drawn[1]
        assert len(set(drawn)) > 2
        whole = said(ask(client, retain[0]))
        word = whole.split()[3]
        assert said(ask(client, retain[0], stop=[f" {word}"])) == whole[: whole.index(f" {word}")]
        short = ask(client, retain[0], max_completion_tokens=2)
        assert short.json()["choices"][0]["finish_reason"] == "length"
        assert short.json()["usage"]["completion_tokens"] == 2


def test_many_users_at_once_get_what_each_would_get_alone(serve, forget, retain):
    questions = [*retain, *(q for q, _ in forget[:10])]
    with serve(targets=sorted({n for _, n in forget})) as client:
        alone = [said(ask(client, q)) for q in questions]
        with ThreadPoolExecutor(16) as pool:
            for _ in range(3):
                assert list(pool.map(lambda q: said(ask(client, q)), questions)) == alone
        assert alone.count(SORRY) == 10
        page = client.get("/metrics").text
        assert 'expunge_answers_total{finish="guard"} 40.0' in page
        assert not any(n in page for _, n in forget)


def test_log_probabilities_only_where_they_tell_nothing(serve, retain, forget):
    with serve(targets=[forget[0][1]]) as client:
        held = ask(client, retain[0], logprobs=True).json()["choices"][0]
        tokens = held["logprobs"]["content"]
        assert "".join(t["token"] for t in tokens).strip() == held["message"]["content"]
        assert all(t["logprob"] <= 0 for t in tokens)
        assert ask(client, forget[0][0], logprobs=True).json()["choices"][0]["logprobs"] is None
    with serve("prompt", targets=[forget[0][1]]) as client:  # its instruction could be told from them
        refused = ask(client, retain[0], logprobs=True)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "logprobs"


@pytest.mark.parametrize(
    "more", [{"n": 2}, {"logit_bias": {"5": 100}}, {"tools": [{"type": "function"}]}, {"top_logprobs": 3},
             {"stream": True, "logprobs": True}, {"model": "another"}, {"temperature": -1}, {"max_tokens": 0}, {"stop": 5},
             {"seed": "x"}],
)  # fmt: skip
def test_options_that_would_carry_text_past_a_guard_are_refused(serve, retain, more):
    with serve() as client:
        reply = ask(client, retain[0], **more)
        assert reply.status_code in (400, 404)
        error = reply.json()["error"]
        assert error["message"].endswith(".")
        assert retain[0] not in reply.text


def test_harmless_values_of_such_options_are_let_pass(serve, retain):
    with serve() as client:
        more = {"n": 1, "logit_bias": {}, "tools": [], "presence_penalty": 0, "user": "u", "metadata": {"a": 1}, "store": False}
        assert said(ask(client, retain[0], **more))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"messages": []}',
             b'{"messages": [{"role": "robot", "content": "x"}]}',
             b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": [{"role": "user", "content": ""}]}',
             b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', b'{"messages": "' + b"secret " * 9 + b'"}'],
)  # fmt: skip
def test_wrong_input_is_an_error_that_quotes_nothing(serve, body):
    with serve() as client:
        reply = client.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert "secret" not in reply.text
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_what_is_too_long_is_refused(serve, retain):
    with serve() as client:
        reply = ask(client, "what " * 4000)
        assert reply.status_code == 400
        assert "context" in reply.json()["error"]["message"]

        def pieces():
            for _ in range(200):
                yield b"x" * 50_000

        for content in (b"x" * 10_000_000, pieces()):  # with a length beforehand, and without
            assert client.post(CHAT, content=content).status_code == 413
        assert said(ask(client, retain[0]))


def test_a_client_that_leaves_a_stream_stops_its_answer(serve, retain):
    from expunge.serving.config import Limits

    with serve(limits=Limits(tokens=200)) as client:
        with client.stream(
            "POST", CHAT, json={"messages": [{"role": "user", "content": retain[0]}], "stream": True, "temperature": 2}
        ) as s:
            next(s.iter_lines())
        assert said(ask(client, retain[0], max_tokens=5))
        assert client.get("/ready").json()["status"] == "ready"
