"""Who may ask and who may administer: API keys by their digests, and how fast."""

from __future__ import annotations

import enum
import hashlib
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import Field, field_validator

from expunge.core.errors import InputError
from expunge.core.files import write_text
from expunge.core.settings import Settings, load_yaml


class Role(enum.StrEnum):
    """What a key allows."""

    ASK = "ask"
    ADMINISTER = "administer"


class Key(Settings):
    """One key of the key file; the key itself is not in it."""

    name: ClassVar[str] = "key"

    client: str = Field(min_length=1, pattern=r"^[\w.@-]+$", description="whose it is; logs hold a pseudonym of it")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, in hexadecimal")
    roles: tuple[Role, ...] = Field((Role.ASK,), min_length=1, description="what it allows")

    @field_validator("roles", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Client:
    """Who asks."""

    name: str
    roles: frozenset[Role]


PROBING = Client("expunge canaries", frozenset({Role.ASK}))
"""The server itself, as it asks its own canaries; no key file can name a client so."""


class Access:
    """Keys of clients.

    Args:
        keys: none: everybody may do everything, which only a server on the loopback interface should allow.
    """

    def __init__(self, keys: list[Key] | None) -> None:
        self.open = keys is None
        self._held = {k.sha256: Client(k.client, frozenset(k.roles)) for k in keys or []}

    @classmethod
    def read(cls, path: Path) -> Access:
        """From a YAML file: a list of ``{client, sha256, roles}``.

        Raises:
            InputError: not there, or not such a list.
        """
        try:
            held: Any = load_yaml(path.read_text(encoding="utf-8"))
        except Exception as error:  # the file, its encoding, its syntax: all the same remedy
            raise InputError(
                f"The key file {str(path)!r} cannot be read: {type(error).__name__}.", "See expunge serve --help."
            ) from None
        if not isinstance(held, list) or not held:
            raise InputError(f"The key file {str(path)!r} holds no list of keys.", "See expunge serve --help.")
        return cls([Key(**entry) for entry in held])

    def client(self, authorization: str | None) -> Client | None:
        """Whose key an ``Authorization`` header holds; none if nobody's."""
        if self.open:
            return Client("anonymous", frozenset(Role))
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        # Looked up by digest: how long that takes tells nothing of the key.
        return self._held.get(hashlib.sha256(key.strip().encode()).hexdigest())


def add_key(path: Path, client: str, roles: Sequence[str]) -> str:
    """Make a key for a client and put its digest into a key file; the key.

    Raises:
        InputError: the file is there and is no key file, or a role is unknown.
    """
    held: list[dict[str, Any]] = []
    if path.exists():
        Access.read(path)
        held = load_yaml(path.read_text(encoding="utf-8"))
    key = "xp-" + secrets.token_urlsafe(32)
    made = Key(client=client, sha256=hashlib.sha256(key.encode()).hexdigest(), roles=tuple(roles))
    write_text(path, yaml.safe_dump([*held, made.model_dump(mode="json")], sort_keys=False))
    path.chmod(0o600)
    return key


@dataclass
class Rates:
    """A bucket of allowances for each client.

    Args:
        rate: requests a second; 0: no limit.
        seconds: of the burst that a full bucket allows.
    """

    rate: float
    seconds: float = 10.0
    _held: dict[str, tuple[float, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, client: str, now: float | None = None) -> float:
        """Take one allowance; 0 if there was one, else the seconds to wait."""
        if not self.rate:
            return 0.0
        now = time.monotonic() if now is None else now
        size = max(1.0, self.rate * self.seconds)
        with self._lock:
            left, last = self._held.get(client, (size, now))
            left = min(size, left + (now - last) * self.rate)
            if left < 1:
                self._held[client] = (left, now)
                return (1 - left) / self.rate
            self._held[client] = (left - 1, now)
            return 0.0
