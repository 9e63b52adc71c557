"""Errors as OpenAI's clients expect them: a status and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from atomc.errors import AtomcError
from atomc.runtime.errors import RequestError, UnavailableError


class ApiError(AtomcError):
    """An answer other than 200. `param` names the field of the request at fault, `code` the problem."""

    def __init__(
        self, status: int, message: str, *, type: str | None = None, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type or ("invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code

    @classmethod
    def of(cls, error: AtomcError) -> ApiError:
        """The client's fault (400), a server that takes nothing now (503), or a failure (500)."""
        if isinstance(error, RequestError):
            return cls(400, error.message, param=error.param, code=error.code)
        if isinstance(error, UnavailableError):
            return cls(503, error.message, code="unavailable")
        return cls(500, error.message, code="engine_error")

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return Response(msgspec.json.encode(self.body), self.status, headers, "application/json")
