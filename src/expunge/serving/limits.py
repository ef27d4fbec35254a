"""How large a request may be, whether or not it says so beforehand; and an answer for what nobody foresaw."""

from __future__ import annotations

import json
import sys
import traceback

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expunge.serving.errors import Refused

_PATIENCE = 32 * 2**20  #: bytes beyond the limit that are read and thrown away


class BodyLimit:
    """ASGI middleware: a body of more bytes than allowed is answered with 413, and is never held as a whole.

    Args:
        app: what is behind it.
        limit: bytes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, _again(await self._body(receive), receive), noted)
        except Refused as refused:
            if begun:
                raise
            await _send(send, refused)
        except Exception as error:
            # The trace names places in the code and the kind of the error; its words may quote the request, so they are left out.
            where = "".join(f"  {f.filename}:{f.lineno} {f.name}\n" for f in traceback.extract_tb(error.__traceback__)[-6:])
            sys.stderr.write(f"unforeseen {type(error).__name__}\n{where}")
            if begun:
                raise
            await _send(send, Refused(500, "The server failed on this request."))

    async def _body(self, receive: Receive) -> Message:
        """The whole body as one message; one that is too large is read off first: most clients listen once they have said all."""
        held, seen = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            seen += len(message.get("body", b""))
            if seen <= self.limit:
                held.append(message.get("body", b""))
            else:
                held.clear()
            if not message.get("more_body") or seen > self.limit + _PATIENCE:
                break
        if seen > self.limit:
            raise Refused(413, f"The request has more than {self.limit} bytes.")
        return {"type": "http.request", "body": b"".join(held), "more_body": False}


def _again(first: Message, receive: Receive) -> Receive:
    left = [first]

    async def replayed() -> Message:
        return left.pop() if left else await receive()

    return replayed


async def _send(send: Send, refused: Refused) -> None:
    body = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    headers += [(k.encode(), v.encode()) for k, v in refused.headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
