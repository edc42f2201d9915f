"""The body of a request: JSON, checked against a pydantic model. What it costs and what is told of it are bounded.

jiter (pydantic's JSON parser) refuses what is nested deeper than 200 levels, halves of surrogate pairs, NaN, and
numbers of more than 4300 digits. Models must not collect an error for every element of a list (`fail_fast`) or of an
object of the client's; then the number of errors follows from the model alone, and the first few are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from actors.gateway.errors import clipped
from scheduler.errors import Rejected

MAX_FIELDS = 256  # of a body, at its top level: OpenAI's chats have about forty
MAX_DEPTH = 200  # jiter's own limit; real schemas and tool calls stay below twenty
TOLD_PROBLEMS = 3
TOLD_LENGTH = 100  # characters of a name or value that came from the client

Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], body: bytes | bytearray) -> Model:
    """`body` as a `model`. Raises Rejected, with the first problems in it."""
    try:
        return model.model_validate(_fields(body))
    except ValidationError as error:
        raise problems_of(error.errors(include_url=False, include_input=False)) from None


def problems_of(errors: Sequence[ErrorDetails] | Sequence[Mapping[str, Any]]) -> Rejected:
    """The first of pydantic's `errors` in one message; `param` is the field of the very first."""
    places = [
        [str(part) for part in problem["loc"] if part not in ("query", "header")] for problem in errors[:TOLD_PROBLEMS]
    ]
    told = [
        f"{clipped('.'.join(place), TOLD_LENGTH)}: {problem['msg']}" if place else problem["msg"]
        for place, problem in zip(places, errors, strict=False)
    ]
    if len(errors) > TOLD_PROBLEMS:
        told.append(f"and {len(errors) - TOLD_PROBLEMS} more")
    return Rejected("; ".join(told), param=clipped(places[0][0], TOLD_LENGTH) if places[0] else None)


def _fields(body: bytes | bytearray) -> dict[str, Any]:
    try:
        data = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise Rejected(f"the body is not valid JSON: {_hint(str(error))}") from None
    if not isinstance(data, dict):
        raise Rejected("the body must be a JSON object: {…}")
    if len(data) > MAX_FIELDS:
        raise Rejected(f"the body has {len(data)} fields; at most {MAX_FIELDS} are allowed")
    return data


def _hint(error: str) -> str:
    if "recursion" in error:
        return f"it is nested deeper than {MAX_DEPTH} levels ({error.rpartition(' at ')[2]})"
    if "hex escape" in error:
        return f"{error} (half of a surrogate pair is not valid Unicode)"
    return error
