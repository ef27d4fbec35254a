"""What a client is told when there is no answer: what was wrong and where, never what it sent."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one sentence without words of the request.
        param: which parameter it is about.
        headers: to send.
    """

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers or {}

    def body(self) -> dict[str, Any]:
        """As clients expect it."""
        kind = {
            400: "invalid_request_error",
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        said = kind.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": said, "param": self.param, "code": None}}
