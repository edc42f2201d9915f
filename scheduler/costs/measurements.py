"""What real loads took, remembered by all that has to be the same for it to happen again.

Three kinds of facts: what llama.cpp allocated for a model in a layout and context, and what the device lost besides
(CUDA's context, libraries and pools, which no report shows); what a model that ran out of memory is given on top; and
what a product of GPU loses per replica. They come back as `Record`s after a restart. A record that cannot be understood
is left out: the formulas stand in for it.

A figure within the report's rounding of the prediction confirms it, and the prediction stands; any other replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from scheduler.costs.params import ContextParams, DeviceBytes, Footprint, HostBytes, Layout
from scheduler.costs.shape import ModelShape
from scheduler.costs.weights import assign_layers
from scheduler.units import MIB, LoadKey

ROUNDING_BYTES = 4 * (MIB // 200 + 1)
"""llama.cpp reports to 0.01 MiB, rounded either way; a figure is the sum of at most four."""
NOTICED_BYTES = 16 * MIB
"""Growth below this is not worth remembering."""
OVERHEAD_MARGIN_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Record:
    """One fact as it is stored; a newer record of the same kind and key replaces it. `value` is what JSON can hold."""

    kind: str
    key: str
    value: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MeasuredLoad:
    """What one model took in one layout and context. `outside_bytes`: per device, the most that the process held there
    beyond llama.cpp's buffers once it had served; 0 while nobody has seen."""

    buffers: Footprint
    outside_bytes: tuple[int, ...]
    loads: int

    def settle(self, predicted: Footprint, layout: Layout) -> Footprint:
        """`predicted`, corrected. Host weights stay: a mapped file is reported as a span, and they are exact anyway.

        On a CUDA device nothing is lowered before it is known what it needs besides its buffers: the prediction has
        room for scratch memory that no report shows.
        """
        devices = []
        for device, ours, theirs, outside in zip(
            layout.devices, predicted.devices, self.buffers.devices, self.outside_bytes, strict=True
        ):
            may_lower = device.kind != "cuda" or outside > 0
            devices.append(
                DeviceBytes(
                    _settled(ours.weights_bytes, theirs.weights_bytes, may_lower),
                    _settled(ours.kv_bytes, theirs.kv_bytes, may_lower),
                    _settled(ours.compute_bytes, theirs.compute_bytes, may_lower),
                )
            )
        ours_host, theirs_host = predicted.host, self.buffers.host
        host = HostBytes(
            ours_host.weights_bytes,
            _settled(ours_host.kv_bytes, theirs_host.kv_bytes, True),
            _settled(ours_host.compute_bytes, theirs_host.compute_bytes, True),
            _settled(ours_host.output_bytes, theirs_host.output_bytes, True),
        )
        return Footprint(tuple(devices), host)


def _settled(predicted: int, measured: int, may_lower: bool) -> int:
    if measured > predicted + ROUNDING_BYTES or may_lower and measured < predicted - ROUNDING_BYTES:
        return measured + ROUNDING_BYTES
    return predicted


def load_key(shape: ModelShape, layout: Layout, context: ContextParams, build: str) -> LoadKey:
    """What must be the same for a load to take the same: the model, by what its header says, each layer's place, kinds
    of devices (not their names), the context, and the release of llama-cpp-python. Raises Rejected as `footprint`."""
    return _load_key(shape.fingerprint, shape.n_layer_all, layout, context, build)


@lru_cache(maxsize=4096)
def _load_key(fingerprint: str, n_layer_all: int, layout: Layout, context: ContextParams, build: str) -> LoadKey:
    kinds = [device.kind for device in layout.devices]
    spilled = layout.n_cpu_moe or layout.experts_on_host
    parts = fingerprint, build, kinds, assign_layers(layout, n_layer_all), spilled, asdict(context)
    return LoadKey(json.dumps(parts))


class Measurements:
    """All that is remembered. Every method that learns returns the record to be stored, or None: nothing was new."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._loads: dict[LoadKey, MeasuredLoad] = {}
        self._known: set[tuple[str, str]] = set()  # fingerprint and build of every load
        self.changes = 0
        """How often what is known has changed."""
        self._extra: dict[str, int] = {}
        self._overheads: dict[str, int] = {}
        for record in records:
            try:
                self._restore(record)
            except (KeyError, TypeError, ValueError):
                continue

    def __len__(self) -> int:
        return len(self._loads) + len(self._extra) + len(self._overheads)

    def _restore(self, record: Record) -> None:
        match record.kind:
            case "load":
                load = _load_from(record.value)
                self._remember(LoadKey(record.key), load)
            case "out_of_memory":
                self._extra[record.key] = _count(record.value["extra_bytes"])
            case "overhead":
                self._overheads[record.key] = _count(record.value["bytes"])
            case _:  # of a newer release
                pass

    def _remember(self, key: LoadKey, load: MeasuredLoad) -> None:
        fingerprint, build = json.loads(key)[:2]
        self._known.add((fingerprint, build))
        self._loads[key] = load
        self.changes += 1

    # ------------------------------------------------------------------ what was allocated

    def load(self, shape: ModelShape, layout: Layout, context: ContextParams, build: str) -> MeasuredLoad | None:
        """What this model took before in this layout and context. Quick where the model was never loaded."""
        if (shape.fingerprint, build) not in self._known:
            return None
        return self._loads.get(load_key(shape, layout, context, build))

    def loaded(
        self,
        shape: ModelShape,
        layout: Layout,
        context: ContextParams,
        build: str,
        buffers: Footprint,
        *,
        times: int = 1,
    ) -> Record:
        """A load succeeded, with these buffers; `times` 0: llama.cpp only said that it would take them."""
        key = load_key(shape, layout, context, build)
        before = self._loads.get(key)
        outside = before.outside_bytes if before else (0,) * len(buffers.devices)
        load = MeasuredLoad(buffers, outside, (before.loads if before else 0) + times)
        self._remember(key, load)
        return Record("load", key, asdict(load))

    def held(self, key: LoadKey, device: int, outside_bytes: int) -> Record | None:
        """A replica's process holds so much on the layout's device beyond its buffers."""
        load = self._loads.get(key)
        if load is None or outside_bytes < load.outside_bytes[device] + NOTICED_BYTES:
            return None
        outside = list(load.outside_bytes)
        outside[device] = outside_bytes
        self._loads[key] = replace(load, outside_bytes=tuple(outside))
        self.changes += 1
        return Record("load", key, asdict(self._loads[key]))

    # ------------------------------------------------------------------ what was missing

    def extra_bytes(self, shape: ModelShape) -> int:
        """What is added to the model's need on each device, since it ran out of memory."""
        return self._extra.get(shape.fingerprint, 0)

    def missed(self, shape: ModelShape, extra_bytes: int) -> Record | None:
        """The model is to have so much more from now on."""
        if self.extra_bytes(shape) == extra_bytes:
            return None
        self._extra[shape.fingerprint] = extra_bytes
        return Record("out_of_memory", shape.fingerprint, {"extra_bytes": extra_bytes})

    # ------------------------------------------------------------------ what a device loses per replica

    def overhead_bytes(self, product: str, build: str) -> int | None:
        """The most that a replica was seen to hold there beyond its buffers, and a margin; None: none was seen."""
        seen = self._overheads.get(_overhead_key(product, build))
        return seen + OVERHEAD_MARGIN_BYTES if seen is not None else None

    def lost(self, product: str, build: str, overhead_bytes: int) -> Record | None:
        """A replica held so much beyond its buffers on a device of this product."""
        key = _overhead_key(product, build)
        if overhead_bytes < self._overheads.get(key, 0) + NOTICED_BYTES:
            return None
        self._overheads[key] = overhead_bytes
        self.changes += 1
        return Record("overhead", key, {"bytes": overhead_bytes})


def _overhead_key(product: str, build: str) -> str:
    return f"{product}, {build}"


def _load_from(value: Mapping[str, Any]) -> MeasuredLoad:
    buffers = value["buffers"]
    devices = tuple(DeviceBytes(**{k: _count(v) for k, v in device.items()}) for device in buffers["devices"])
    host = HostBytes(**{k: _count(v) for k, v in buffers["host"].items()})
    outside = tuple(_count(count) for count in value["outside_bytes"])
    if len(outside) != len(devices):
        raise ValueError("one figure per device is needed")
    return MeasuredLoad(Footprint(devices, host), outside, _count(value["loads"]))


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a number of bytes")
    return value
