"""LoRA adapters of a request, in llama-server's words: `"lora": [{"id": 0, "scale": 0.5}]`, or by name."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.records import MAX_NAME_LENGTH
from scheduler.entry_parts import MOST_SCALE

MAX_ADAPTERS = 256  # named in a request
_LARGEST_ID = 2**31 - 1

Scales = tuple[tuple[int | str, float], ...]


class AdapterScale(BaseModel):
    """An adapter, by its place in the catalogue or its name, and how strongly it applies."""

    model_config = ConfigDict(allow_inf_nan=False)

    id: int | None = Field(default=None, ge=0, le=_LARGEST_ID)
    name: str | None = Field(default=None, min_length=1, max_length=MAX_NAME_LENGTH)
    scale: float = Field(ge=-MOST_SCALE, le=MOST_SCALE)

    @model_validator(mode="after")
    def _names_one(self) -> AdapterScale:
        if (self.id is None) == (self.name is None):
            raise ValueError("name the adapter by its id or by its name")
        return self

    @property
    def which(self) -> int | str:
        return self.id if self.id is not None else self.name or ""


class LoraSettings(BaseModel):
    """What all requests for answers share."""

    lora: Annotated[list[AdapterScale], Field(fail_fast=True, max_length=MAX_ADAPTERS)] | None = None

    def scales(self) -> Scales | None:
        return None if self.lora is None else tuple((each.which, each.scale) for each in self.lora)
