"""The NVML probe with the real pynvml over a driver library that the tests compile."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from beside import Program

from actors.devices.processes import sees_host_pids
from scheduler.units import GIB, MIB

PROBE = """
import dataclasses, json, logging, sys
from actors.devices import nvml

warnings = []
logging.getLogger("actors.devices.nvml").addHandler(type("Keep", (logging.Handler,), {
    "emit": lambda self, record: warnings.append(record.getMessage())})())
for line in sys.stdin:
    match line.split():
        case ["list"]:
            answer = [dataclasses.asdict(facts) for facts in nvml.list_gpus("n1")]
        case ["read", uuid]:
            answer = dataclasses.asdict(nvml.read_gpu(uuid))
            answer["processes"] = answer["processes"] and {str(k): v for k, v in answer["processes"].items()}
        case ["reason"]:
            answer = nvml.unavailable_reason()
        case ["warnings"]:
            answer = warnings
    print(json.dumps(answer), flush=True)
"""

NOT_SUPPORTED, NO_DRIVER, LOST = 3, 9, 15
needs_host_pids = pytest.mark.skipif(not sees_host_pids(), reason="pids of a container are not the driver's")


def gpu(
    uuid: str,
    *,
    status: int = 0,
    total: int = 24 * GIB,
    reserved: int = 300 * MIB,
    used: int = 0,
    utilisation: int = 0,
    temperature: int = 40,
    mig: int = -NOT_SUPPORTED,
    name: str = "Stub RTX 3090",
) -> str:
    return f"gpu {uuid} {status} {total} {reserved} {used} {utilisation} {temperature} {mig} {name}\n"


class Machine:
    """A machine with the stub driver: `set` changes its cards under the probe."""

    def __init__(self, probe: Program, control: Path) -> None:
        self._probe, self._control = probe, control

    def set(self, *lines: str) -> None:
        # Replaced as a whole: the library must never read half a machine.
        fresh = self._control.with_suffix(".new")
        fresh.write_text("".join(lines))
        fresh.replace(self._control)

    def ask(self, command: str) -> Any:
        return self._probe.ask(command)


@pytest.fixture(scope="module")
def stub_drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("c++")
    assert compiler, "a C compiler is needed, as it is for llama.cpp"
    folders = {}
    for name, flags in (("new", []), ("old", ["-DOLD_DRIVER"])):
        folders[name] = tmp_path_factory.mktemp(f"{name}-driver")
        library = folders[name] / "libnvidia-ml.so.1"
        source = Path(__file__).with_name("stub_nvml.c")
        command = [
            compiler,
            "-x",
            "c",
            "-std=c11",
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            *flags,
            "-o",
            library,
            source,
        ]
        subprocess.run(command, check=True)
    return folders


@pytest.fixture
def machine(stub_drivers: dict[str, Path], tmp_path: Path, beside: Callable[..., Program]) -> Callable[..., Machine]:
    def start(*lines: str, driver: str = "new") -> Machine:
        control = tmp_path / "machine"
        environment = {"LD_LIBRARY_PATH": str(stub_drivers[driver]), "STUB_NVML": str(control)}
        stub = Machine(beside(PROBE, environment=environment), control)
        stub.set(*lines)
        return stub

    return start


def test_lists_unlike_cards_with_uuid_name_and_usable_memory(machine: Callable[..., Machine]) -> None:
    found = machine(gpu("GPU-a"), gpu("GPU-b", total=8 * GIB, reserved=0, name="Stub 1070")).ask("list")
    assert [(card["device_id"], card["label"], card["product"], card["total_bytes"]) for card in found] == [
        ("GPU-a", "gpu0", "Stub RTX 3090", 24 * GIB - 300 * MIB),
        ("GPU-b", "gpu1", "Stub 1070", 8 * GIB),
    ]
    assert {(card["kind"], card["node_id"], card["state_path"]) for card in found} == {("cuda", "n1", "")}


def test_reads_what_the_card_shows_and_follows_it(machine: Callable[..., Machine]) -> None:
    stub = machine(gpu("GPU-a", used=GIB, utilisation=37, temperature=61))
    reading = stub.ask("read GPU-a")
    assert reading["used_bytes"] == GIB
    assert reading["free_bytes"] == reading["total_bytes"] - GIB == 23 * GIB - 300 * MIB
    assert (reading["utilisation"], reading["temperature_c"], reading["lost_reason"]) == (0.37, 61.0, "")

    stub.set(gpu("GPU-a", used=5 * GIB))
    assert stub.ask("read GPU-a")["used_bytes"] == 5 * GIB


@needs_host_pids
def test_processes_that_compute_and_draw_are_counted_once(machine: Callable[..., Machine]) -> None:
    stub = machine(
        gpu("GPU-a", used=3 * GIB),
        gpu("GPU-b"),
        f"process 0 c 100 {2 * GIB}\nprocess 0 g 100 {2 * GIB}\nprocess 0 g 200 {GIB}\nprocess 1 c 300 {MIB}\n",
    )
    assert stub.ask("read GPU-a")["processes"] == {"100": 2 * GIB, "200": GIB}
    assert stub.ask("read GPU-b")["processes"] == {"300": MIB}


@pytest.mark.parametrize("hidden", [f"processes_status {NOT_SUPPORTED}\n", "process 0 c 100 -1\n"])
def test_processes_are_unknown_where_the_driver_does_not_say(machine: Callable[..., Machine], hidden: str) -> None:
    reading = machine(gpu("GPU-a", used=GIB), hidden).ask("read GPU-a")
    assert reading["processes"] is None
    assert reading["used_bytes"] == GIB


def test_a_card_that_falls_off_the_bus_is_lost_with_the_drivers_words(machine: Callable[..., Machine]) -> None:
    stub = machine(gpu("GPU-a"), gpu("GPU-b"))
    assert stub.ask("read GPU-a")["lost_reason"] == ""
    stub.set(gpu("GPU-a", status=LOST), gpu("GPU-b"))
    lost = stub.ask("read GPU-a")
    assert "GPU is lost" in lost["lost_reason"]
    assert (lost["total_bytes"], lost["free_bytes"]) == (0, 0)
    # The other card goes on, in readings and in a listing that meets the dead one first.
    assert stub.ask("read GPU-b")["lost_reason"] == ""
    assert [card["device_id"] for card in stub.ask("list")] == ["GPU-b"]


def test_a_card_that_is_lost_between_two_questions_is_lost(machine: Callable[..., Machine]) -> None:
    reading = machine(gpu("GPU-a", utilisation=-LOST)).ask("read GPU-a")
    assert "GPU is lost" in reading["lost_reason"]


def test_a_card_that_vanished_is_lost(machine: Callable[..., Machine]) -> None:
    assert machine(gpu("GPU-b")).ask("read GPU-a")["lost_reason"] != ""


def test_a_driver_too_old_for_a_call_answers_the_rest(machine: Callable[..., Machine]) -> None:
    stub = machine(
        gpu("GPU-a", used=GIB, utilisation=-NOT_SUPPORTED, temperature=-NOT_SUPPORTED),
        f"process 0 c 100 {GIB}\n",
        driver="old",
    )
    reading = stub.ask("read GPU-a")
    # Without the second memory structure the driver's own share counts as used; free is right in both.
    assert (reading["total_bytes"], reading["used_bytes"]) == (24 * GIB, GIB + 300 * MIB)
    assert reading["free_bytes"] == 23 * GIB - 300 * MIB
    assert (reading["utilisation"], reading["temperature_c"], reading["lost_reason"]) == (None, None, "")
    assert reading["processes"] == ({"100": GIB} if sees_host_pids() else None)


def test_cards_that_no_model_can_use_are_left_out_with_a_warning(machine: Callable[..., Machine]) -> None:
    stub = machine(gpu("GPU-a", mig=1), gpu("GPU-b", mig=0), gpu("GPU-c", status=NOT_SUPPORTED))
    assert [(card["device_id"], card["label"]) for card in stub.ask("list")] == [("GPU-b", "gpu1")]
    assert [warning[:17] for warning in stub.ask("warnings")] == ["GPU 0 is left out", "GPU 2 is left out"]


def test_without_a_library_there_are_no_cards_and_a_reason(beside: Callable[..., Program], tmp_path: Path) -> None:
    # A file that is no library stands before any real driver of this machine.
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    probe = beside(PROBE, environment={"LD_LIBRARY_PATH": str(tmp_path)})
    assert probe.ask("list") == []
    assert "no NVIDIA driver" in probe.ask("reason")
    assert "no NVIDIA driver" in probe.ask("read GPU-a")["lost_reason"]


def test_a_driver_that_comes_up_later_is_found(machine: Callable[..., Machine]) -> None:
    stub = machine(gpu("GPU-a"), f"driver {NO_DRIVER}\n")
    assert stub.ask("list") == []
    assert "Driver Not Loaded" in stub.ask("reason")
    stub.set(gpu("GPU-a"))
    assert stub.ask("reason") == ""
    assert len(stub.ask("list")) == 1
