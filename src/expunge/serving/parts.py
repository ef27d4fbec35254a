"""What the routes share, and who may use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from expunge.guards.parts import TEXT_LEVEL
from expunge.guards.policy import Policy
from expunge.serving.access import Access, Client, Rates, Role
from expunge.serving.answering import Answering
from expunge.serving.backends import Backend
from expunge.serving.config import Limits
from expunge.serving.errors import Refused
from expunge.serving.store import Requests
from expunge.serving.telemetry import Telemetry

if TYPE_CHECKING:
    from expunge.serving.canary import Rounds


@dataclass
class Parts:
    """One server.

    Attributes:
        policy: guards.
        backend: writes answers.
        answering: joins both.
        requests: forget requests.
        telemetry: counts.
        access: keys of clients.
        limits: what one client may ask for.
        key: secret of the guard; seeds of requests that give none follow from it.
        canaries: try the server out; none: nobody does.
    """

    policy: Policy
    backend: Backend
    answering: Answering
    requests: Requests
    telemetry: Telemetry
    access: Access
    limits: Limits
    key: bytes
    canaries: Rounds | None = None
    rates: Rates = field(init=False)

    def __post_init__(self) -> None:
        self.rates = Rates(self.limits.rate)

    @property
    def clear(self) -> bool:
        """Whether log-probabilities tell nothing of the guards: they neither touch the scores nor put words before the model."""
        return all(r.action.acts <= TEXT_LEVEL and not r.action.rewrites and not r.action.revises for r in self.policy.rows)


def parts_of(request: Request) -> Parts:
    """The server that a request came to."""
    found: Parts = request.app.state.parts
    return found


def _allowed(request: Request, needed: Role) -> Client:
    parts = parts_of(request)
    client = parts.access.client(request.headers.get("authorization"))
    if client is None:
        raise Refused(401, "The key is missing or unknown.", headers={"www-authenticate": "Bearer"})
    if needed not in client.roles:
        raise Refused(403, "The key does not allow this.")
    if wait := parts.rates.take(client.name):
        raise Refused(429, "Too many requests.", headers={"retry-after": str(int(wait) + 1)})
    return client


def asking(request: Request) -> Client:
    """Who asks.

    Raises:
        Refused: no key, one that does not allow it, or too many requests.
    """
    return _allowed(request, Role.ASK)


def administering(request: Request) -> Client:
    """Who administers; see :func:`asking`."""
    return _allowed(request, Role.ADMINISTER)
