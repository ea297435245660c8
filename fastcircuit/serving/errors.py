"""What a client did wrong, or the server could not do, in OpenAI's format."""

from typing import Any


class ApiError(Exception):
    """An answer other than 200. ``param`` names the parameter that is to blame, if there is one."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {
            "error": {
                "message": message,
                "type": "invalid_request_error" if status < 500 else "server_error",
                "param": param,
                "code": code,
            }
        }
