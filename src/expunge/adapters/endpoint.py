"""Questions to a server with the common interface of chat servers, over HTTP: many at a time, asked again where that helps.

Nothing but answers in words is asked for. A key is sent with each request and is written nowhere, in no file and no message.
What was answered can be kept in a file of the run, so that a run that was killed goes on where it stopped; no other run reads it,
since who serves a model may change it.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from expunge.adapters.extra import need
from expunge.core.errors import ExpungeError, InputError, unknown
from expunge.core.files import digest_json
from expunge.core.settings import Settings

CHAT, TEXT = "chat/completions", "completions"
KEY = "EXPUNGE_SERVED_KEY"  #: environment variable that holds the key
_AGAIN = frozenset({408, 409, 425, 429, 529})  #: answered otherwise a little later, as is everything from 500 on
_LONGEST = 120.0  #: seconds that are waited between two attempts at most
#: how servers say that a request has too many tokens
_LONG = re.compile(r"context (length|window|size|holds)|maximum context|too (long|many tokens)", re.IGNORECASE)
_LOCAL = ("127.0.0.1", "localhost", "::1")
_QUOTED = 200  #: characters of a server's own words in a message


class Unanswered(ExpungeError):
    """A server gave no answer in the middle of the work."""


class Endpoint(Settings):
    """Where a model is served, and how it is asked."""

    name: ClassVar[str] = "served"

    url: str = Field(description="address of the interface, usually up to /v1")
    model: str = Field(min_length=1, description="name of the model, as the server lists it")
    key_env: str = Field(
        KEY, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds the key, if one is"
    )
    form: Literal["auto", "chat", "completions"] = Field(
        "auto",
        description="how questions are put: as chats, as texts to be completed; auto: chats, and texts where a text goes on",
    )
    parallel: int = Field(8, ge=1, le=256, description="requests at a time")
    seconds: float = Field(120.0, gt=0, description="how long one answer may take")
    attempts: int = Field(6, ge=1, le=100, description="how often a question is put before it is given up")
    pause: float = Field(1.0, ge=0, le=60, description="seconds before the second attempt; they double with each further one")
    refusals: tuple[str, ...] = Field((), description="texts that the server gives in the model's place, beside those it marks")

    @field_validator("url")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an address begins with http:// or https:// and a host, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("an address holds no key and no parameters; a key comes from an environment variable")
        bare = value.rstrip("/")
        for route in (CHAT, TEXT):
            if bare.endswith("/" + route):
                raise ValueError(f"an address ends before /{route}: {bare.removesuffix('/' + route)}")
        return bare

    @property
    def local(self) -> bool:
        """Whether it is on this machine."""
        return urlsplit(self.url).hostname in _LOCAL


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: without white space at both ends.
        ended: whether it ended by itself, before the limit.
        refused: whether something answered in the model's place, or stopped it: the server says so, or the text is one of those
            that are known.
        short: whether the question was short enough for the server; it has no answer to one that was not.
    """

    text: str
    ended: bool
    refused: bool
    short: bool = True


class Asker:
    """Asks a server.

    Args:
        endpoint: where and how.
        kept: file of this run's answers; none keeps them in memory.

    Attributes:
        run: a name of this run's answers that no other has.
        said: what the server says of itself (guards' policy, its fingerprint), by kind: two values of a kind are two models.

    Raises:
        MissingExtra: httpx is not installed.
        InputError: the file is of another server.
    """

    def __init__(self, endpoint: Endpoint, kept: Path | None = None) -> None:
        self.endpoint = endpoint
        self._httpx = need("httpx", "Asking a server", "serve")
        self._key = os.environ.get(endpoint.key_env, "").strip()
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        limits = self._httpx.Limits(max_connections=endpoint.parallel)
        timeout = self._httpx.Timeout(endpoint.seconds, connect=min(10.0, endpoint.seconds), pool=None)
        self._client = self._httpx.Client(headers=headers, timeout=timeout, limits=limits, trust_env=not endpoint.local)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._not_before = 0.0
        self._asked: dict[str, tuple[str, dict[str, Any]]] = {}
        self.said: dict[str, set[str]] = {}
        self.run, self._known = _read(kept, endpoint)
        self._file = _opened(kept, endpoint, self.run)

    def close(self) -> None:
        """Let go of connections and of the file."""
        self._stop.set()
        self._client.close()
        if self._file is not None:
            self._file.close()

    @property
    def notes(self) -> list[str]:
        """What the user must know before the work."""
        if self._key and not self.endpoint.local and self.endpoint.url.startswith("http://"):
            return [
                f"The key in {self.endpoint.key_env} goes to {self.endpoint.url} unencrypted: anybody on the way can read it."
            ]
        return []

    # ---- before the work

    def check(self) -> None:
        """Ask for the models and for one word, so that what is wrong is said before any work.

        Raises:
            InputError: nothing answers, the key is not accepted, there is no such model, or it does not answer in this form.
        """
        answer = self._try("GET", "models", None)
        if answer.status_code in (401, 403):
            self._refuse(answer, InputError)
        if answer.status_code == 200:
            try:
                names = [str(m["id"]) for m in answer.json()["data"]]
            except (ValueError, KeyError, TypeError):
                names = []
            if names and self.endpoint.model not in names:
                raise unknown(f"model at {self.endpoint.url}", self.endpoint.model, names)
        chat = self.endpoint.form != "completions"
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
        route = CHAT if chat else TEXT
        answer = self._try("POST", route, self._body(body, 1))
        if answer.status_code == 429 or answer.status_code >= 500:
            return  # it is there, and busy; the work will wait for it
        if answer.status_code != 200:
            if self._filtered(answer) is None:
                self._refuse(answer, InputError, route)
        elif self._reply(answer, route) is None:
            raise InputError(f"What {self.endpoint.url} answers is no answer of a chat server.", "Mend the address.")

    def _try(self, method: str, route: str, body: Mapping[str, Any] | None) -> Any:
        try:
            return self._client.request(method, f"{self.endpoint.url}/{route}", json=body)
        except self._httpx.TimeoutException:
            raise InputError(
                f"The server at {self.endpoint.url} did not answer within {self.endpoint.seconds:g} seconds.",
                "See whether it is up, or give it longer: served.seconds=600.",
            ) from None
        except self._httpx.HTTPError as error:
            raise InputError(
                f"Nothing answers at {self.endpoint.url} ({type(error).__name__}).",
                "Start the server, or mend the address; it usually ends with /v1.",
            ) from None

    # ---- the work

    def ask(self, questions: Sequence[tuple[str, Mapping[str, Any]]], limit: int) -> list[Reply]:
        """Answers to questions, several at a time.

        Args:
            questions: of each the route, and ``messages`` or ``prompt`` with what else the server is to know, such as
                ``temperature`` (0 if it is not given).
            limit: longest answer in tokens of the server.

        Raises:
            Unanswered: one of them got none; the others' answers are kept.
        """
        bodies = [(route, self._body(said, limit)) for route, said in questions]
        pool = ThreadPoolExecutor(max_workers=self.endpoint.parallel, thread_name_prefix="expunge-ask")
        work = [pool.submit(self._answer, route, body) for route, body in bodies]
        try:
            wait(work, return_when=FIRST_EXCEPTION)
            failed = next((w.exception() for w in work if w.done() and w.exception() is not None), None)
            if failed is not None:
                raise failed
            return [w.result() for w in work]
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._stop.clear()

    def again(self, count: int) -> tuple[int, int]:
        """Put some of the questions of this process once more: how many, and to how many the answer was another one."""
        with self._lock:
            asked = [(k, *v) for k, v in self._asked.items() if v[1]["temperature"] == 0 and k in self._known]
        chosen = asked[:: max(1, len(asked) // count)][:count] if asked else []
        return len(chosen), sum(self._put(route, body) != self._known[key] for key, route, body in chosen)

    @property
    def too_long(self) -> int:
        """Questions that were longer than the server takes."""
        with self._lock:
            return sum(not r.short for r in self._known.values())

    def _body(self, said: Mapping[str, Any], limit: int) -> dict[str, Any]:
        return {"model": self.endpoint.model, "max_tokens": limit, "temperature": 0, "seed": 0, "stream": False, **said}

    def _answer(self, route: str, body: dict[str, Any]) -> Reply:
        key = digest_json([route, body])
        with self._lock:
            held = self._known.get(key)
        if held is not None:
            return held
        reply = self._put(route, body)
        with self._lock:
            self._known[key] = reply
            self._asked[key] = route, body
            if self._file is not None:
                line = {"key": key, "text": reply.text, "ended": reply.ended, "refused": reply.refused}
                line |= {} if reply.short else {"short": False}
                self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
                self._file.flush()
        return reply

    def _put(self, route: str, body: Mapping[str, Any]) -> Reply:
        why = ""
        for attempt in range(self.endpoint.attempts):
            self._wait()
            answer = None
            try:
                answer = self._client.post(f"{self.endpoint.url}/{route}", json=body)
            except self._httpx.TimeoutException:
                why = f"did not answer within {self.endpoint.seconds:g} seconds"
            except self._httpx.HTTPError as error:
                why = f"could not be reached ({type(error).__name__})"
            else:
                reply = self._reply(answer, route) if answer.status_code == 200 else self._filtered(answer)
                if reply is not None:
                    return reply
                if answer.status_code == 200:
                    why = "gave no sound answer"
                elif answer.status_code == 429:
                    why = "takes no more requests now (status 429)"
                elif answer.status_code in _AGAIN or answer.status_code >= 500:
                    why = f"failed (status {answer.status_code})"
                else:
                    self._refuse(answer, Unanswered, route)
            if attempt + 1 < self.endpoint.attempts:
                self._back_off(attempt, answer)
        tried = f"{self.endpoint.attempts} attempts" if self.endpoint.attempts > 1 else "one attempt"
        raise Unanswered(
            f"The server at {self.endpoint.url} {why}, after {tried}.",
            "What was answered is kept: the same command with --resume goes on. Fewer requests at a time (served.parallel=1) or "
            "more patience (served.attempts=20, served.seconds=600) may help.",
        )

    def _wait(self) -> None:
        """Until the server takes requests again, as far as it has said when."""
        while True:
            if self._stop.is_set():
                raise Unanswered("The questions were broken off.", "The same command with --resume goes on.")
            left = self._not_before - time.monotonic()
            if left <= 0:
                return
            self._stop.wait(left)

    def _back_off(self, attempt: int, answer: Any) -> None:
        """Wait as long as the server asks for, or twice as long as before; after 429 and 503 everybody waits."""
        pause = min(_LONGEST, self.endpoint.pause * 2**attempt * (1 + random.random() / 4))  # noqa: S311  (to spread requests)
        asked = None if answer is None else _seconds(answer.headers.get("retry-after", ""))
        pause = pause if asked is None else min(_LONGEST, max(asked, pause))
        if answer is not None and answer.status_code in (429, 503):
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + pause)
        else:
            self._stop.wait(pause)

    # ---- what comes back

    def _reply(self, answer: Any, route: str) -> Reply | None:
        """The answer of a sound reply; none if it is not sound."""
        try:
            held = answer.json()
            choice = held["choices"][0]
            said = choice["message"] if route == CHAT else choice
            text, refusal = said["content" if route == CHAT else "text"], said.get("refusal")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None
        text = refusal if text is None and refusal else text or ""
        if not isinstance(text, str):
            return None
        for kind, value in (
            ("policy", answer.headers.get("x-expunge-policy")), ("fingerprint", held.get("system_fingerprint")),
            ("model", held.get("model")),
        ):  # fmt: skip
            if isinstance(value, str) and value:
                with self._lock:
                    self.said.setdefault(kind, set()).add(value)
        finish = choice.get("finish_reason")
        refused = finish == "content_filter" or bool(refusal) or text.strip() in {r.strip() for r in self.endpoint.refusals}
        return Reply(text.strip(), finish != "length", refused)

    @staticmethod
    def _filtered(answer: Any) -> Reply | None:
        """An error that is an answer without words: a filter has refused the request, or it does not fit the model's context."""
        if answer.status_code not in (400, 413, 422):
            return None
        try:
            error = answer.json()["error"]
            code, said = error.get("code"), str(error.get("message"))
        except (ValueError, KeyError, TypeError, AttributeError):
            code, said = None, ""
        if code == "content_filter":
            return Reply("", True, True)
        long_ = answer.status_code == 413 or code == "context_length_exceeded" or _LONG.search(said)
        return Reply("", True, False, short=False) if long_ else None

    def _refuse(self, answer: Any, kind: type[ExpungeError], route: str = "") -> NoReturn:
        """Say why a server does not take a request.

        Raises:
            ExpungeError: always, of the given kind.
        """
        at, status, said = self.endpoint.url, answer.status_code, self._words(answer)
        if status in (401, 403) and self._key:
            raise kind(f"The server at {at} does not accept the key in {self.endpoint.key_env}{said}", "Give one that may ask.")
        if status in (401, 403):
            raise kind(
                f"The server at {at} asks for a key{said}", f"Put it into the environment variable {self.endpoint.key_env}."
            )
        if status in (404, 405):
            other = "completions" if route == CHAT else "chat"
            remedy = f"Mend the address, which usually ends with /v1, or ask otherwise: served.form={other}."
            raise kind(f"The server at {at} has no {route} for the model {self.endpoint.model!r}{said}", remedy)
        raise kind(f"The server at {at} does not take the request (status {status}){said}", "Ask it otherwise, or see its log.")

    def _words(self, answer: Any) -> str:
        """A server's own words, short, in one line, without the key."""
        try:
            held = answer.json()["error"]
            text = str(held["message"] if isinstance(held, dict) else held)
        except (ValueError, KeyError, TypeError):
            return "."
        text = " ".join(text.split())
        text = text.replace(self._key, "***") if self._key else text
        return f": {text[:_QUOTED].rstrip('.')}." if text else "."


def _seconds(header: str) -> float | None:
    """What Retry-After asks for, in seconds from now."""
    with suppress(ValueError):
        return max(0.0, float(header))
    with suppress(ValueError, TypeError):  # a date, perhaps; else nothing that can be read
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return None


def _read(path: Path | None, endpoint: Endpoint) -> tuple[str, dict[str, Reply]]:
    """Name and answers of a run, by key; those of a line that was not written to its end are asked for again."""
    if path is None or not path.is_file():
        return secrets.token_hex(16), {}
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    if not lines or lines[0].get("url") != endpoint.url or lines[0].get("model") != endpoint.model:
        raise InputError(f"The file {str(path)!r} is not of the model {endpoint.model!r} at {endpoint.url}.", "Remove it.")
    return str(lines[0]["run"]), {
        d["key"]: Reply(d["text"], d["ended"], d["refused"], d.get("short", True)) for d in lines[1:] if "key" in d
    }


def _opened(path: Path | None, endpoint: Endpoint, run: str) -> Any:
    """The file of answers, for its owner alone: it holds what is to be forgotten."""
    if path is None:
        return None
    new = not path.is_file()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    file = os.fdopen(handle, "a", encoding="utf-8")
    start = json.dumps({"url": endpoint.url, "model": endpoint.model, "run": run}) if new else ""
    file.write(start + "\n")  # of a run that was killed: whatever was not written to its end stands on a line of its own
    file.flush()
    return file
