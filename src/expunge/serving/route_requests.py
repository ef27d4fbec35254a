"""Forget requests: what is hidden, from when and until when."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, ParamSpec, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from expunge.guards.target import Shown, Target
from expunge.serving.access import Client
from expunge.serving.errors import Refused
from expunge.serving.parts import administering, parts_of
from expunge.serving.schema import Text
from expunge.serving.store import Entry, Unkept

router = APIRouter(prefix="/v1/expunge/requests", tags=["forget requests"])
P = ParamSpec("P")
T = TypeVar("T")
_KEY = re.compile(r"[\x21-\x7e]{1,200}")


async def _kept(read: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    try:
        return await asyncio.to_thread(read, *given, **named)
    except Unkept as unkept:
        raise unkept.refused() from None


class ShownBody(BaseModel):
    """A question and what is said of it."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text = Field("", max_length=20_000)
    answer: Text = Field("", max_length=20_000)


class ForgetBody(BaseModel):
    """What is to be hidden."""

    model_config = ConfigDict(extra="forbid")

    entities: list[Text] = Field([], max_length=1000, description="names and aliases")
    examples: list[ShownBody] = Field([], max_length=1000, description="questions and answers")
    topics: list[Text] = Field([], max_length=1000, description="what it is about, a sentence each")
    skills: list[Text] = Field([], max_length=100, description="names of skills")
    until: datetime | None = Field(None, description="when it ends")
    reason: Text = Field("", max_length=1000, description="why, for the file; no names")

    def target(self) -> Target:
        """As guards take it."""
        shown = tuple(Shown(prompt=e.prompt, answer=e.answer) for e in self.examples)
        lists = {k: tuple(getattr(self, k)) for k in ("entities", "topics", "skills")}
        return Target(examples=shown, until=self.until, **lists)


class ForgetEntry(BaseModel):
    """A forget request as it is shown: never what it hides."""

    id: str
    state: str
    created: datetime
    until: datetime | None
    ended: datetime | None
    summary: str

    @classmethod
    def of(cls, entry: Entry) -> ForgetEntry:
        """From the store's."""
        return cls(**{k: v for k, v in asdict(entry).items() if k != "new"})


class ForgetList(BaseModel):
    """Forget requests, in the order in which they came."""

    data: list[ForgetEntry]


@router.post("", status_code=201, responses={200: {"model": ForgetEntry, "description": "The request was there already"}})
async def forget(
    body: ForgetBody,
    request: Request,
    response: Response,
    client: Annotated[Client, Depends(administering)],
    idempotency_key: Annotated[str | None, Header(description="the same key and body: the same request")] = None,
) -> ForgetEntry:
    """Hide something; it is hidden when the answer comes."""
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        raise Refused(400, "An idempotency key has 1 to 200 visible ASCII characters.", "Idempotency-Key")
    entry = await parts_of(request).requests.add(idempotency_key, body.target(), body.reason)
    response.status_code = 201 if entry.new else 200
    return ForgetEntry.of(entry)


@router.get("")
async def listed(
    request: Request,
    client: Annotated[Client, Depends(administering)],
    state: Annotated[str | None, Query(pattern="^(active|withdrawn|expired)$")] = None,
    after: Annotated[str | None, Query(max_length=64, description="id of the last one of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ForgetList:
    """What was asked to be hidden, a page at a time."""
    held = await _kept(parts_of(request).requests.store.entries, state, after, limit)
    return ForgetList(data=[ForgetEntry.of(e) for e in held])


@router.get("/{name}")
async def shown(
    request: Request, client: Annotated[Client, Depends(administering)], name: Annotated[str, Path(max_length=64)]
) -> ForgetEntry:
    """One of them."""
    entry = await _kept(parts_of(request).requests.store.entry, name)
    if entry is None:
        raise Refused(404, "There is no such request.")
    return ForgetEntry.of(entry)


@router.delete("/{name}")
async def withdrawn(
    request: Request, client: Annotated[Client, Depends(administering)], name: Annotated[str, Path(max_length=64)]
) -> ForgetEntry:
    """Hide it no more; it is open when the answer comes."""
    return ForgetEntry.of(await parts_of(request).requests.withdraw(name))
