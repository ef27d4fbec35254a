"""A chat server whose replies are a table: real HTTP on the loopback interface, no model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """What a test sees of it: calls as they came, and the replies to give."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.reply: Callable[[dict[str, Any]], Any] = lambda asked: ""
        self.url = ""

    def sizes(self) -> list[int]:
        return [sum(len(m["content"]) for m in c["messages"]) for c in self.calls]


@contextmanager
def chat_server():
    """A server; its ``reply`` gets each request and returns a text, or a pair of a status and a body."""
    held = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked["authorization"] = self.headers.get("Authorization", "")
            held.calls.append(asked)
            found = held.reply(asked)
            status, body = found if isinstance(found, tuple) else (200, {"choices": [{"message": {"content": found}}]})
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    held.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
