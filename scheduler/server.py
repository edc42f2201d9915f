"""The part of the catalogue file that is about the HTTP gateway: where it listens, who may ask, what it may fetch."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

UNNAMED_KEY = "unnamed"
PORTS = {"http": 80, "https": 443}
_ORIGIN = re.compile(
    r"(?:(?P<scheme>https?)://)?"
    r"(?P<host>[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}))?",
    re.IGNORECASE,
)


def parse_origin(text: str) -> str:
    """The scheme, name and port of a host, such as "https://images.example.org:443". Raises ValueError."""
    found = _ORIGIN.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is not a host; write its name (images.example.org), or with scheme and port "
            "(http://images.local:8080), without path and *"
        )
    scheme = (found["scheme"] or "https").lower()
    return f"{scheme}://{found['host'].lower()}:{int(found['port'] or PORTS[scheme])}"


Origin = Annotated[str, AfterValidator(parse_origin)]


class Server(BaseModel):
    """The HTTP gateway."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; other addresses than loopback need api_key")
    port: int = Field(11535, ge=0, le=65535)
    ollama_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="a second port, for Ollama clients that can use only 11434; none: no second port",
    )
    api_key: str | None = Field(None, min_length=8, description="clients send it as a bearer token")
    api_keys: dict[str, Annotated[str, Field(min_length=8)]] = Field(
        default_factory=dict, description="API keys of several users, by name: each has a fair share of the queue"
    )
    media_hosts: tuple[Origin, ...] = Field(
        (),
        description="pictures that a request names by URL are fetched only from these hosts: names (by https), or with "
        "scheme and port (http://images.local:8080); none: nothing is fetched",
    )

    @property
    def keys(self) -> dict[str, str]:
        """All keys by name. The name of `api_key` is empty, or UNNAMED_KEY if there are `api_keys`, too."""
        if self.api_key is None:
            return self.api_keys
        return {UNNAMED_KEY if self.api_keys else "": self.api_key, **self.api_keys}

    @field_validator("api_keys")
    @classmethod
    def _unlike_the_unnamed(cls, keys: dict[str, str]) -> dict[str, str]:
        if UNNAMED_KEY in keys:
            raise ValueError(f"{UNNAMED_KEY!r} is the name of api_key; choose another name")
        return keys

    @model_validator(mode="after")
    def _one_key_each(self) -> Server:
        names: dict[str, str] = {}
        for name, key in self.keys.items():
            if key in names:
                raise ValueError(f"{names[key] or 'api_key'} and {name} have the same key; give each user another key")
            names[key] = name
        return self
