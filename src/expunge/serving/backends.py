"""Who writes the answers: a model of this process, or another server behind this one."""

from __future__ import annotations

import abc
import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Answer, Sampling
from expunge.guards.guarded import Guarded
from expunge.guards.policy import Plan
from expunge.guards.prompts import cleaned
from expunge.serving.errors import Refused

Sink = Callable[[str], None]
_LETTERS = 64  #: characters of a token at most; an answer of another server that has more is given up
_LINE = 2**20  #: bytes of an event at most
_PATIENCE = 10.0  #: seconds that a question of the server's own waits for a moment without users


class Preempted(Exception):
    """A user came while a question of the server's own was answered; it is to be asked again."""


class Backend(abc.ABC):
    """Answers requests under their plans."""

    model: str  #: name that clients give and get

    @abc.abstractmethod
    async def answer(
        self,
        plan: Plan,
        sampling: Sampling,
        sink: Sink | None,
        cancelled: Callable[[], bool],
        *,
        scores: bool,
        low: float | None = None,
    ) -> Answer:
        """The answer to a request that no guard has answered yet; pieces go to ``sink``, in the event loop's thread.

        Args:
            plan: of its guards.
            sampling: how tokens are chosen.
            sink: takes pieces.
            cancelled: whether nobody waits for it any more.
            scores: whether log-probabilities are wanted.
            low: since when it waits (``time.perf_counter``), of a question of the server's own: users go before it.

        Raises:
            Refused: there is none.
            Preempted: a user has come meanwhile.
        """

    def cleaned(self, conversation: Conversation) -> Conversation:
        """Without what only the server may write, such as special tokens of the model."""
        return conversation

    async def ready(self) -> bool:
        """Whether requests would be answered now."""
        return True

    async def close(self) -> None:  # noqa: B027
        """Finish what was begun and stop."""


@dataclass
class _Job:
    plan: Plan
    sampling: Sampling
    sink: Sink | None
    cancelled: Callable[[], bool]
    scores: bool
    done: asyncio.Future[Answer]
    loop: asyncio.AbstractEventLoop
    low: float | None = None
    ended: bool = False

    def piece(self, text: str) -> None:
        assert self.sink is not None
        self.loop.call_soon_threadsafe(self.sink, text)

    def end(self, result: Answer | BaseException) -> None:
        self.ended = True

        def told() -> None:
            if self.done.done():
                return
            if isinstance(result, BaseException):
                self.done.set_exception(result)
            else:
                self.done.set_result(result)

        self.loop.call_soon_threadsafe(told)


class LocalBackend(Backend):
    """A model of this process. Requests that wait are answered together, in one batch at a time.

    An answer goes back when it is over; what comes meanwhile waits for the batch to end. Questions of the server's own are
    answered one by one while no user waits, and given up for the next user who comes; one that has not got its turn for ten
    seconds goes along with users' requests.

    Args:
        guarded: model and guards.
        model: its name.
        batch: requests in a batch at most.
        waiting: requests that may wait.
        observed: told of the size of each batch.
    """

    def __init__(
        self,
        guarded: Guarded,
        model: str,
        *,
        batch: int = 16,
        waiting: int = 256,
        observed: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.guarded, self.model, self.batch, self.waiting, self.observed = guarded, model, batch, waiting, observed
        self._queue: deque[_Job] = deque()
        self._aside: deque[_Job] = deque()
        self._more = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="expunge-model", daemon=True)
        self._thread.start()

    async def answer(
        self,
        plan: Plan,
        sampling: Sampling,
        sink: Sink | None,
        cancelled: Callable[[], bool],
        *,
        scores: bool,
        low: float | None = None,
    ) -> Answer:
        """See :class:`Backend`."""
        loop = asyncio.get_running_loop()
        job = _Job(plan, sampling, sink, cancelled, scores, loop.create_future(), loop, low)
        with self._more:
            if self._closing:
                raise Refused(503, "The server is going down.", headers={"retry-after": "5"})
            if low is None and len(self._queue) >= self.waiting:
                raise Refused(503, "Too many requests wait for an answer.", headers={"retry-after": "1"})
            (self._queue if low is None else self._aside).append(job)
            self._more.notify()
        try:
            return await job.done
        except InputError as error:
            raise Refused(400, error.message) from None
        except (Refused, Preempted):
            raise
        except Exception as error:  # its words may quote the request
            raise Refused(500, f"The model failed: {type(error).__name__}.") from None

    def cleaned(self, conversation: Conversation) -> Conversation:
        """See :class:`Backend`."""
        return cleaned(conversation, self.guarded.adapter.tokenizer)

    async def ready(self) -> bool:
        """See :class:`Backend`."""
        return self._thread.is_alive() and not self._closing

    async def close(self) -> None:
        """See :class:`Backend`."""
        with self._more:
            self._closing = True
            self._more.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _work(self) -> None:
        while True:
            with self._more:
                while not self._queue and not self._aside and not self._closing:
                    self._more.wait()
                if not self._queue and not self._aside:
                    return
                jobs = [self._queue.popleft() for _ in range(min(self.batch, len(self._queue)))]
                if self._aside and (not jobs or time.perf_counter() - (self._aside[0].low or 0.0) > _PATIENCE):
                    jobs.append(self._aside.popleft())
            self._answer([j for j in jobs if not self._gone(j)])

    def _gone(self, job: _Job) -> bool:
        if job.cancelled():
            job.end(Answer("", "cancelled", 0))
            return True
        return False

    def _answer(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        alone = len(jobs) == 1 and jobs[0].low is not None
        if not alone:
            self.observed(len(jobs))
        try:
            answers = self.guarded.obeyed(
                [j.plan for j in jobs], [j.sampling for j in jobs], [j.piece if j.sink else None for j in jobs],
                cancelled=[partial(self._yields, j) if alone else j.cancelled for j in jobs],
                over=None if alone else [j.end for j in jobs], scores=any(j.scores for j in jobs),
            )  # fmt: skip
        except Exception as error:  # one that cannot be answered must not take the others with it
            for job in [j for j in jobs if not j.ended]:
                if len(jobs) == 1 or job.plan.begun:  # what was sent once must not be sent again
                    job.end(error)
                else:
                    self._answer([job])
            return
        for job, answer in zip(jobs, answers, strict=True):
            early = alone and answer.finish == "cancelled" and not job.cancelled()
            job.end(Preempted() if early else answer)

    def _yields(self, job: _Job) -> bool:
        """Whether a question of the server's own is to be given up: nobody waits for it, or a user waits."""
        return job.cancelled() or bool(self._queue)


@dataclass
class UpstreamBackend(Backend):
    """Another server with the same interface. Its answers are held back until guards of text have let them pass.

    Args:
        url: of its interface, with ``/v1``.
        model: that is asked for.
        key: for it.
        seconds: it may be silent for.
    """

    url: str
    model: str
    key: str | None = None
    seconds: float = 60.0
    _client: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        self._client = httpx.AsyncClient(
            headers=headers, timeout=httpx.Timeout(self.seconds, connect=min(10.0, self.seconds)), trust_env=False
        )

    async def close(self) -> None:
        """See :class:`Backend`."""
        await self._client.aclose()

    async def ready(self) -> bool:
        """See :class:`Backend`."""
        try:
            return (await self._client.get(f"{self.url}/models", timeout=5)).status_code < 500
        except httpx.HTTPError:
            return False

    async def answer(
        self,
        plan: Plan,
        sampling: Sampling,
        sink: Sink | None,
        cancelled: Callable[[], bool],
        *,
        scores: bool,
        low: float | None = None,
    ) -> Answer:
        """See :class:`Backend`."""
        text, finish, count, sent = "", "length", 0, 0
        limit = 1000 + _LETTERS * sampling.max_tokens
        try:
            async for piece, ended in self._pieces(plan, sampling):
                text, count = text + piece, count + bool(piece)
                finish = ended or finish
                if cancelled():
                    return Answer(text[:sent], "cancelled", count)
                if len(text) > limit:
                    raise Refused(502, "The server behind this one does not end its answer.")
                safe = plan.release(text, final=False)
                if sink is not None and not plan.buffered and safe > sent:
                    sink(text[sent:safe])
                    sent = safe
                if plan.say is not None:
                    break
        except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
            status = 504 if isinstance(error, httpx.TimeoutException) else 502
            said = "is silent" if status == 504 else "gave no sound answer"
            raise Refused(status, f"The server behind this one {said}.", headers={"x-expunge-outcome": "upstream"}) from None
        if plan.say is None:
            plan.release(text, final=True)
        whole = plan.revised(text)
        if sink is not None and (plan.say is None or not sent):
            sink(whole if plan.buffered or plan.say is not None else whole[sent:])
        if plan.say is not None:
            return Answer(text[:sent] if sink is not None and sent else plan.say, "guard", count)
        return Answer(whole, "stop" if finish == "stop" else "length", count)

    async def _pieces(self, plan: Plan, sampling: Sampling) -> AsyncIterator[tuple[str, str | None]]:
        """Pieces of the answer, and why it ended."""
        asked = plan.conversation
        body: dict[str, Any] = {
            "model": self.model, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "seed": sampling.seed, "stream": True,
        }  # fmt: skip
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if asked.verbatim:
            route, body["prompt"] = "completions", asked.text
        else:
            route, body["messages"] = "chat/completions", [{"role": m.role, "content": m.content} for m in asked.messages]
        async with self._client.stream("POST", f"{self.url}/{route}", json=body) as reply:
            if reply.status_code != 200:
                raise ValueError("status")
            if not reply.headers.get("content-type", "").startswith("text/event-stream"):
                raise ValueError("no stream")
            async for line in _lines(reply):
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                yield self._piece(json.loads(data), asked.verbatim)
        raise ValueError("the stream broke off")

    @staticmethod
    def _piece(event: Any, verbatim: bool) -> tuple[str, str | None]:
        if "error" in event:
            raise ValueError("error")
        if not event["choices"]:
            return "", None
        choice = event["choices"][0]
        delta = choice if verbatim else choice["delta"]
        # What no guard reads must not pass: calls of tools, refusals, reasoning, sound.
        if any(delta.get(k) for k in ("tool_calls", "function_call", "audio", "reasoning", "reasoning_content")):
            raise ValueError("parts that no guard reads")
        text = delta.get("text" if verbatim else "content") or ""
        if not isinstance(text, str):
            raise ValueError("no text")
        return text, choice.get("finish_reason")


async def _lines(reply: httpx.Response) -> AsyncIterator[str]:
    """Lines of a reply; a line that never ends is an error, before it fills the memory."""
    held = b""
    async for chunk in reply.aiter_bytes():
        held += chunk
        *lines, held = held.split(b"\n")
        for line in lines:
            yield line.decode().rstrip("\r")
        if len(held) > _LINE:
            raise ValueError("a line without an end")
