"""Parts of a model's entry in the catalogue file: other parameters for it, its adapters, the sizes of its vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
VectorSizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | Literal["any"]
MOST_SCALE = 16.0
"""Of an adapter, either sign. At 16 two small models still wrote sentences, at 64 no word. And a number that overflows
would stay in the cache and spoil the answers of others."""


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Alternative(Strict):
    """Other parameters to load a model with. Missing keys are as in the model's entry."""

    n_ctx: int | None = Field(None, ge=256, description="context of all slots together")
    type_k: CacheType | None = Field(None, description="type of the K cache")
    type_v: CacheType | None = Field(None, description="type of the V cache")


class AdapterEntry(Strict):
    """A LoRA adapter of a model; a text is its path."""

    model_config = ConfigDict(json_schema_extra={"type": ["object", "string"]})

    path: str = Field(min_length=1, description="GGUF file or glob on the nodes")
    scale: float = Field(
        1.0, ge=-MOST_SCALE, le=MOST_SCALE, description="strength of the adapter if a request names no adapters"
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value
