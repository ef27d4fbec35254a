"""Answers in the form of chat servers."""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from expunge.serving.access import Client
from expunge.serving.answering import Asked
from expunge.serving.errors import Refused
from expunge.serving.parts import Parts, asking, parts_of
from expunge.serving.schema import ChatRequest, CompletionRequest

router = APIRouter(prefix="/v1", tags=["answers"])
_FORMS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer; with stream=true as events", "content": {"application/json": {}, "text/event-stream": {}}}
}


def prepared(parts: Parts, body: ChatRequest | CompletionRequest, client: Client) -> Asked:
    """A request, as it was sent, on its way.

    Raises:
        Refused: it asks for what cannot be had, or for nothing.
    """
    body.refuse_unsupported()
    chat = isinstance(body, ChatRequest)
    scores = bool(body.logprobs) if isinstance(body, ChatRequest) else body.logprobs is not None
    if scores and not parts.clear:
        raise Refused(400, "Log-probabilities would tell what the guards hide; leave logprobs out.", "logprobs")
    if scores and body.stream:
        raise Refused(400, "Log-probabilities are not streamed.", "logprobs")
    conversation = body.conversation()
    if not conversation.text.strip():
        raise Refused(400, "The request says nothing.", "messages" if chat else "prompt")
    if body.model not in (None, "", parts.backend.model):
        raise Refused(404, f"The model {parts.backend.model!r} is served here, and no other.", "model")
    drawn = hmac.digest(parts.key, conversation.text.encode(), hashlib.sha256)
    asked = (body.max_completion_tokens or body.max_tokens) if isinstance(body, ChatRequest) else body.max_tokens
    sampling = body.sampling(parts.limits.tokens, asked, int.from_bytes(drawn[:7], "big"))
    return Asked("chat" if chat else "completions", chat, conversation, sampling, scores, body.wants_usage, client)


async def _respond(body: ChatRequest | CompletionRequest, client: Client, request: Request) -> Response:
    parts = parts_of(request)
    asked = prepared(parts, body, client)
    headers = {"x-expunge-request": asked.id, "x-expunge-policy": parts.policy.digest()[:16]}
    if body.stream:
        return StreamingResponse(parts.answering.stream(asked, request), media_type="text/event-stream", headers=headers)
    return JSONResponse(await parts.answering.whole(asked, request), headers=headers)


@router.post("/chat/completions", response_model=None, responses=_FORMS)
async def chat(body: ChatRequest, request: Request, client: Annotated[Client, Depends(asking)]) -> Response:
    """An answer to a conversation."""
    return await _respond(body, client, request)


@router.post("/completions", response_model=None, responses=_FORMS)
async def completions(body: CompletionRequest, request: Request, client: Annotated[Client, Depends(asking)]) -> Response:
    """A text, continued."""
    return await _respond(body, client, request)


@router.get("/models")
async def models(request: Request, client: Annotated[Client, Depends(asking)]) -> dict[str, Any]:
    """What is served."""
    name = parts_of(request).backend.model
    return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "expunge"}]}
