"""The body of a completions request: what it may say, checked before anything is computed."""

import json
import reprlib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fastcircuit.serving.errors import ApiError

Prompts = list[str] | list[list[int]]
# Parameters of OpenAI that are not supported, with the values at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
_LEAST_TEMPERATURE = 1e-3  # below it, logits divided by the temperature lose what tells them apart


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class CompletionBody(BaseModel):
    """The parameters of ``/v1/completions`` that are supported, with OpenAI's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    prompt: Any
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[Any, Field(validate_default=True)] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    user: str | None = None  # names an end user, for abuse reports; nothing depends on it

    @field_validator("prompt")
    @classmethod
    def _prompts(cls, prompt: Any) -> Prompts:
        prompts = [prompt] if isinstance(prompt, str) or (prompt and _are(prompt, int)) else prompt
        if prompts in ([], None):
            raise ValueError("is empty; give at least one character or token")
        if not _are(prompts, str) and not (_are(prompts, list) and all(_are(ids, int) for ids in prompts)):
            raise ValueError("must be a string, a list of strings, a list of token ids, or a list of those")
        empty = next((at for at, one in enumerate(prompts) if not one), None)
        if empty is not None:
            where = f" (number {empty + 1} of {len(prompts)})" if len(prompts) > 1 else ""
            raise ValueError(f"is empty{where}; give at least one character or token")
        return prompts

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: Any) -> list[str]:
        stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
        if not _are(stops, str) or len(stops) > 4 or not all(stops):
            raise ValueError("must be a string or a list of at most 4 strings, none of them empty")
        return stops

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, temperature: float | None) -> float | None:
        if temperature is not None and 0 < temperature < _LEAST_TEMPERATURE:
            raise ValueError(f"must be 0 (greedy) or between {_LEAST_TEMPERATURE} and 2")
        return temperature


def parse(raw: bytes) -> CompletionBody:
    """The request in a body; :class:`ApiError` naming the first parameter that is wrong or not supported."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object, not {type(body).__name__}")
    for name, neutral in _NEUTRAL.items():
        if body.pop(name, None) not in neutral:
            raise ApiError(f"{name} is not supported by this server; leave it out", param=name, code="unsupported")
    try:
        request = CompletionBody.model_validate(body)
    except ValidationError as error:
        raise _explain(error) from error
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options is only for stream: true", param="stream_options")
    return request


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _explain(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    param = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return ApiError(f"{param} is no parameter of this server; leave it out", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(f"{param} is missing", param=param, code="missing_parameter")
    if first["type"] == "value_error":
        return ApiError(f"{param} {first['ctx']['error']}", param=param)
    return ApiError(f"{param} is {reprlib.repr(first['input'])}: {first['msg']}", param=param)
