"""Chat models that guards may ask: one behind an OpenAI-compatible URL, or the served model itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from expunge.adapters.extra import need
from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.data.records import Record

Messages = Sequence[tuple[str, str]]  #: role and content of each turn


class Chat(Protocol):
    """Anything that answers turns with a text; called from many threads at once."""

    def __call__(self, messages: Messages, max_tokens: int) -> str:
        """The answer to some turns. Whatever it raises, the request that needed it is refused."""


class ChatError(Exception):
    """A chat model could not be reached, or did not answer as one. Its words never quote what was asked or said."""


class HttpChat:
    """A model behind ``URL/chat/completions``.

    Args:
        url: of the server, with its version (``http://127.0.0.1:8000/v1``).
        model: as the server calls it.
        key_variable: environment variable that holds the key; none: no key is sent.
        timeout: seconds for one answer.
        temperature: of drawing.

    Raises:
        InputError: the URL is none, or the variable is not set.
    """

    def __init__(self, url: str, model: str, key_variable: str = "", timeout: float = 60.0, temperature: float = 0.0) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise InputError(f"{url!r} is no URL of a chat server.", "Give one such as http://127.0.0.1:8000/v1.")
        if key_variable and key_variable not in os.environ:
            raise InputError(f"The environment variable {key_variable!r} is not set.", "Set it to the key of the chat server.")
        headers = {"Authorization": f"Bearer {os.environ[key_variable]}"} if key_variable else {}
        self._client = need("httpx", "A chat model behind a URL", "serve").Client(headers=headers, timeout=timeout)
        self._url, self._model, self._temperature = url.rstrip("/") + "/chat/completions", model, temperature

    def __call__(self, messages: Messages, max_tokens: int) -> str:
        """Ask it.

        Raises:
            ChatError: no answer, a status that is none of success, or an answer of another shape.
        """
        asked = {
            "model": self._model, "messages": [{"role": r, "content": c} for r, c in messages], "max_tokens": max_tokens,
            "temperature": self._temperature,
        }  # fmt: skip
        try:
            reply = self._client.post(self._url, json=asked)
        except Exception as error:
            raise ChatError(f"the chat server did not answer: {type(error).__name__}") from None
        if reply.status_code != 200:
            raise ChatError(f"the chat server answered with status {reply.status_code}")
        try:
            text: Any = reply.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise ChatError("the chat server did not answer as one") from None
        if not isinstance(text, str):
            raise ChatError("the chat server answered without a text")
        return text


class ModelChat:
    """A language model in this process, asked with the likeliest tokens.

    Whoever calls it must be alone with the model: revisions of answers are, for they are made while the batch holds it.

    Args:
        adapter: the model.
    """

    def __init__(self, adapter: LanguageAdapter) -> None:
        self._adapter = adapter

    def __call__(self, messages: Messages, max_tokens: int) -> str:
        """Ask it."""
        adapter = self._adapter
        example = adapter.encode(Record(id="agent", messages=tuple(messages), answer="x"))
        return adapter.generate(adapter.model, [example], max_tokens)[0].text
