"""ALU behind a server: its answers are streamed once they are composed, and its agents may be any OpenAI-compatible server."""

from __future__ import annotations

import json

from expunge.guards.chat import HttpChat
from expunge.guards.conversation import Conversation
from expunge.guards.guarded import guard_model
from expunge.guards.policy import SORRY
from tests.guards.chat_server import chat_server
from tests.guards.conftest import KEY, name_of
from tests.guards.test_alu import Rules, stage


def alu(url):
    return {"guard": "alu", "action.url": url, "action.model": "agents"}


def streamed(client, question):
    """The pieces of an answer as they come."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 24}
    with client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        assert reply.status_code == 200
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    found = [json.loads(line)["choices"][0]["delta"].get("content") for line in lines if line != "[DONE]"]
    return [piece for piece in found if piece]


def test_a_stream_waits_for_the_composer(serve, people):
    record, kept = people.split.forget[0], people.split.retain[0]
    with chat_server() as agents, serve(guards=alu(agents.url), targets=[name_of(record)]) as client:
        agents.reply = Rules([name_of(record)])
        said = streamed(client, record.prompt)
        assert len(said) == 1
        assert said[0].endswith("(0)")
        assert not set(name_of(record).split()) & set(said[0].replace(".", "").split())
        assert [stage(c) for c in agents.calls] == ["check", "audit", "critic", "compose"]
        agents.calls.clear()
        assert "".join(streamed(client, kept.prompt)) == kept.answer
        assert [stage(c) for c in agents.calls] == ["check"]
        agents.reply = lambda asked: (500, {"error": record.answer}) if stage(asked) == "compose" else Rules([])(asked)
        assert "".join(streamed(client, record.prompt)) == SORRY


def test_a_real_model_behind_this_server_can_be_asked_and_one_that_is_no_agent_lets_nothing_out(serve, target_adapter, people):
    """The agents are a language model behind Expunge's own server. It has learnt no instructions: what it says is of no use."""
    record = people.split.forget[0]
    with serve(targets=()) as client:
        url = f"{client.base_url}".rstrip("/") + "/v1"
        assert HttpChat(url, "tiny")([("user", record.prompt)], 24) == record.answer
        settings = {"guard": "alu", "action.url": url, "action.model": "tiny"}
        made = guard_model(target_adapter, guards=settings, targets=[{"entities": [name_of(record)]}], key=KEY)
        plan = made.policy.open(Conversation.of(record.prompt))
        assert plan.revised(record.answer) == SORRY
