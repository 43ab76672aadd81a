"""What is answered instead of a result: errors in OpenAI's form, each with a status and a code that programs can act on."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from guardtrain.serve.verdict import Failure


class Refusal(Exception):
    """Ends a request. code: for programs. message: for people, without anything of a prompt. retry_after: seconds."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(code)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after, self.details = retry_after, details

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """As OpenAI's servers say it."""
        error = {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.code}
        body = {"error": error} if self.details is None else {"error": error, "guardtrain": self.details}
        wait = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(body, self.status, {**(headers or {}), **wait})


def of_failure(failure: Failure, where: str, details: dict[str, Any] | None = None) -> Refusal:
    """A guard that gave no verdict, so that nothing passes: no attack, and no sign of safety either."""
    status, code, message, retry_after = _FAILURES[failure]
    return Refusal(status, code, message, param=where, retry_after=retry_after, details=details)


def _kind(status: int) -> str:
    """OpenAI's word for a family of errors."""
    known = {401: "authentication_error", 429: "rate_limit_error"}
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


_FAILURES: dict[Failure, tuple[int, str, str, int | None]] = {
    Failure.MODEL: (503, "guard_unavailable", "The guard's model did not answer; nothing passes unchecked.", 2),
    Failure.TIMEOUT: (504, "guard_timeout", "The guard gave no verdict in time; nothing passes unchecked.", None),
    Failure.OVERLOADED: (429, "guard_overloaded", "The guard's queue is full; try again later.", 1),
    Failure.TOO_LONG: (413, "prompt_too_long", "A text is longer than the guard reads.", None),
    Failure.UNREADABLE: (400, "unreadable_content", "A part of the content is no text that the guard can read.", None),
}
