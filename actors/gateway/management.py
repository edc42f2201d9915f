"""Arriero's own routes: what is where and why, what would happen, and the orders to load, unload and pin."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated
from weakref import WeakValueDictionary

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from actors.gateway.backend import Backend
from actors.gateway.feed import Feed
from actors.gateway.reader import Reader
from actors.gateway.security import key_of, source_of
from actors.gateway.stream import EventStream, while_connected
from actors.records import (
    MAX_NAME_LENGTH,
    MAX_TOKENS,
    LoadRequest,
    LoadResult,
    ModelInfo,
    PinRequest,
    PinResult,
    Plan,
    Status,
    UnloadRequest,
    UnloadResult,
)
from scheduler.events import RequestArrived
from scheduler.units import RequestId

Name = Annotated[str, Query(min_length=1, max_length=MAX_NAME_LENGTH)]


def management_routes(backend: Backend, reader: Reader, pulse_s: float) -> APIRouter:
    """`/api/v1/*` and `/health`."""
    router = APIRouter(tags=["Arriero"])
    # A plan takes the scheduler up to 0.2 s, in which nobody is granted anything: they are made one after the other, so
    # that other requests come in between.
    planning = asyncio.Lock()
    lines: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by source: the first of each is in line
    feed = Feed(backend)

    async def planned(source: str, model: str, n_ctx: int | None) -> Plan:
        line = lines.setdefault(source, asyncio.Lock())
        async with line, planning:
            return await backend.plan(model, n_ctx)

    @router.get("/api/v1/status")
    async def status() -> Status:
        return await backend.status()

    @router.get("/api/v1/plan")
    async def plan(
        request: Request, model: Name, n_ctx: Annotated[int | None, Query(ge=1, le=MAX_TOKENS)] = None
    ) -> Plan:
        return await while_connected(request, planned(source_of(request), model, n_ctx))

    @router.get("/api/v1/models")
    async def models() -> list[ModelInfo]:
        return await backend.models()

    @router.post("/api/v1/load")
    async def load(request: Request) -> LoadResult:
        body = await reader.order(request, LoadRequest)
        asked = RequestId(f"load-{secrets.token_hex(12)}")
        need = RequestArrived(asked, body.model, "load", body.n_ctx, key=key_of(request))
        return await while_connected(request, backend.load(need))

    @router.post("/api/v1/unload")
    async def unload(request: Request) -> UnloadResult:
        body = await reader.order(request, UnloadRequest)
        return await backend.unload(body.model)

    @router.post("/api/v1/pin")
    async def pin(request: Request) -> PinResult:
        body = await reader.order(request, PinRequest)
        return await backend.pin(body.model, body.pinned)

    @router.get("/api/v1/events")
    async def events(
        request: Request,
        after: Annotated[int | None, Query(ge=0)] = None,
        follow: bool = True,
        last_event_id: Annotated[int | None, Header(ge=0)] = None,
    ) -> Response:
        # A browser that reconnects repeats its first URL, so what it has seen since (the header) counts more.
        since = last_event_id if last_event_id is not None else after
        return EventStream(feed.events(since or 0, follow, source_of(request)), pulse_s)

    @router.get("/api/v1/health")
    @router.get("/health", include_in_schema=False)
    async def health() -> Response:
        now = await backend.health()
        return JSONResponse(now.model_dump(), 503 if now.status == "failing" else 200)

    return router
