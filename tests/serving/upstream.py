"""A server that another one stands before: it answers from a table, or misbehaves as it is told."""

from __future__ import annotations

import asyncio
import json

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


def upstream_app(answers, seen=None):
    """The application; ``answers`` maps a part of a question to an answer, or to the name of a way to misbehave."""
    app = FastAPI()
    seen = [] if seen is None else seen

    @app.get("/v1/models")
    async def models():
        return {"data": []}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        seen.append((body, request.headers.get("authorization")))
        asked = "\n".join(m["content"] for m in body["messages"])
        answer = next((a for q, a in answers.items() if q in asked), "I do not know.")
        way = answer.removeprefix("!") if answer.startswith("!") else ""
        if way == "hang":
            await _gone(request)
        if way == "status":
            return JSONResponse({"error": {"message": "secret of upstream"}}, 500)
        if way == "json":
            return JSONResponse({"choices": [{"message": {"content": "not a stream"}}]})
        if way == "html":
            return Response("<html>secret of upstream</html>", media_type="text/html")
        return StreamingResponse(_events(way, answer, request), media_type="text/event-stream")

    return app


async def _gone(request):
    for _ in range(300):
        await asyncio.sleep(0.1)
        if await request.is_disconnected():
            return


async def _events(way, answer, request):
    def event(delta, finish=None):
        return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode() + b"\n\n"

    if way == "garbage":
        yield b"data: {not json\n\n"
        return
    if way == "bytes":
        yield b"data: \xff\xfe\n\n"
        return
    if way == "tools":
        yield event({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]})
        yield b"data: [DONE]\n\n"
        return
    if way == "odd":
        yield b"data: " + json.dumps({"choices": [{"delta": {"content": 5}}]}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"
        return
    if way == "endless":
        while True:
            yield event({"content": "word " * 2000})
            await asyncio.sleep(0)
    for word in (answer if not way else "It begins and").split(" "):
        yield event({"content": word + " "})
        await asyncio.sleep(0)
    if way == "breaks":
        return
    if way == "stalls":
        await _gone(request)
    yield event({}, "stop")
    yield b"data: [DONE]\n\n"
