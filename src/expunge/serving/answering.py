"""From a request to an answer: the guards look, the backend writes, and what comes goes to the client in its form."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from expunge.core.errors import ExpungeError
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Answer, Sampling
from expunge.guards.policy import Plan, Policy
from expunge.serving.access import PROBING, Client
from expunge.serving.backends import Backend, Preempted
from expunge.serving.errors import Refused
from expunge.serving.ledger import Ledger
from expunge.serving.telemetry import Telemetry

_FINISH = {"stop": "stop", "length": "length", "guard": "content_filter", "cancelled": "stop"}


@dataclass
class Asked:
    """One request on its way."""

    route: str
    chat: bool
    conversation: Conversation
    sampling: Sampling
    scores: bool
    usage: bool
    client: Client

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.began = time.perf_counter()

    @property
    def low(self) -> float | None:
        """Since when it waits for a moment in which no user does; none: it is a user's."""
        return self.began if self.client is PROBING else None


class Answering:
    """Answers requests.

    Args:
        policy: guards.
        backend: who writes.
        ledger: keeps the record of each request.
        telemetry: counts.
        seconds: for one request.
        tell: whether a client learns that a guard has spoken (``finish_reason`` is ``content_filter``), or sees a usual end.
    """

    def __init__(
        self, policy: Policy, backend: Backend, ledger: Ledger, telemetry: Telemetry, *, seconds: float, tell: bool = True
    ) -> None:
        self.policy, self.backend, self.ledger, self.telemetry = policy, backend, ledger, telemetry
        self.seconds, self.tell = seconds, tell

    async def whole(self, asked: Asked, request: Request) -> dict[str, Any]:
        """The answer in one piece.

        Raises:
            Refused: there is none: the client is gone, it took too long, or the backend gave none.
        """
        plan, answer = await self._answer(asked, request, None)
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._finish(answer), "logprobs": _logprobs(asked, answer)}
        if asked.chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        return {
            **self._head(asked, "chat.completion" if asked.chat else "text_completion"),
            "choices": [choice],
            "usage": _usage(plan, answer),
        }

    async def stream(self, asked: Asked, request: Request) -> AsyncIterator[bytes]:
        """The answer as server-sent events; a piece is sent once nothing that follows can forbid it."""
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        gone = False

        async def work() -> tuple[Plan, Answer]:
            try:
                return await self._answer(asked, request, pieces.put_nowait, lambda: gone)
            finally:
                pieces.put_nowait(None)

        task = asyncio.create_task(work())
        try:
            if asked.chat:
                yield self._event(asked, {"role": "assistant", "content": ""})
            while (piece := await pieces.get()) is not None:
                yield self._event(asked, {"content": piece} if asked.chat else piece)
            try:
                plan, answer = await task
            except Refused as refused:
                yield _data(refused.body())
                return
            yield self._event(asked, {} if asked.chat else "", self._finish(answer))
            if asked.usage:
                kind = "chat.completion.chunk" if asked.chat else "text_completion"
                yield _data({**self._head(asked, kind), "choices": [], "usage": _usage(plan, answer)})
            yield b"data: [DONE]\n\n"
        finally:
            gone = True  # the client went away: no more tokens for it
            if not task.done():
                await asyncio.wait([task], timeout=self.seconds)

    async def probed(self, asked: Asked, *, stream: bool) -> tuple[Plan, str]:
        """The answer to a question of the server's own, as a client would have got it, and what the guards decided.

        It takes the way of any request: the same guards, the same decoding, a record in the log. Users go before it.

        Args:
            asked: by :data:`~expunge.serving.access.PROBING`.
            stream: piece by piece.

        Raises:
            Refused: there is none.
        """
        while True:
            pieces: list[str] = []
            try:
                plan, answer = await self._answer(asked, None, pieces.append if stream else None)
            except Preempted:
                continue
            return plan, "".join(pieces) if stream else answer.text

    async def _answer(self, asked: Asked, request: Request | None, sink: Any, gone: Any = lambda: False) -> tuple[Plan, Answer]:
        plan = await run_in_threadpool(self.policy.open, self.backend.cleaned(asked.conversation))
        if plan.say is None:
            answer = await self._written(asked, plan, request, sink, gone)
        else:  # the model is not asked, so such an answer need not wait for it
            answer = Answer(plan.say, "guard", 0)
            if sink is not None:
                sink(plan.say)
        seconds = time.perf_counter() - asked.began
        if asked.low is None:  # what the server asks itself is no use that is made of it
            self.telemetry.answered(asked.route, plan, answer, seconds)
        try:
            await self.ledger.answered(asked.client.name, plan, answer, seconds)
        except ExpungeError:  # an answer without a record must not be given
            raise Refused(503, "The log of this server cannot be written.") from None
        return plan, answer

    async def _written(self, asked: Asked, plan: Plan, request: Request | None, sink: Any, gone: Any) -> Answer:
        over = False
        self.telemetry.running.inc()
        work = asyncio.create_task(
            self.backend.answer(plan, asked.sampling, sink, lambda: over or gone(), scores=asked.scores, low=asked.low)
        )
        # Of a stream the server notices by itself that the client went away; else it has to be asked.
        left = asyncio.create_task(_disconnected(request)) if sink is None and request else None
        try:
            done, _ = await asyncio.wait(
                {work, left} if left else {work}, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if work in done:
                return work.result()
            raise (
                Refused(499, "The client went away.")
                if done
                else Refused(504, f"There was no answer within {self.seconds:g} seconds.")
            )
        except Refused as refused:
            await self._given_up(asked, plan, f"status {refused.status}")
            raise
        finally:
            over = True
            self.telemetry.running.dec()
            for task in (work, left):
                if task is not None:
                    task.cancel()

    async def _given_up(self, asked: Asked, plan: Plan, why: str) -> None:
        await self.ledger.given_up(asked.client.name, plan, why, time.perf_counter() - asked.began)

    def _finish(self, answer: Answer) -> str:
        return _FINISH[answer.finish] if self.tell or answer.finish != "guard" else "stop"

    def _head(self, asked: Asked, kind: str) -> dict[str, Any]:
        return {"id": asked.id, "object": kind, "created": asked.created, "model": self.backend.model}

    def _event(self, asked: Asked, piece: dict[str, Any] | str, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta" if asked.chat else "text": piece, "finish_reason": finish, "logprobs": None}
        return _data({**self._head(asked, "chat.completion.chunk" if asked.chat else "text_completion"), "choices": [choice]})


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _usage(plan: Plan, answer: Answer) -> dict[str, int]:
    return {"prompt_tokens": answer.prompt, "completion_tokens": answer.tokens, "total_tokens": answer.prompt + answer.tokens}


def _logprobs(asked: Asked, answer: Answer) -> dict[str, Any] | None:
    if not asked.scores or answer.finish == "guard":
        return None
    pairs = list(zip(answer.pieces, answer.log_probabilities, strict=True))
    if asked.chat:
        return {
            "content": [{"token": t, "logprob": p, "bytes": list(t.encode()), "top_logprobs": []} for t, p in pairs],
            "refusal": None,
        }
    return {"tokens": [t for t, _ in pairs], "token_logprobs": [p for _, p in pairs], "top_logprobs": None, "text_offset": None}


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
