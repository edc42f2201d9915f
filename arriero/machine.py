"""This machine's Ray: found, joined, or started; and what `arriero down` needs to remember of it.

A Ray that Arriero starts listens on loopback only, asks for a token, and runs until `arriero down`. The state file
(`$XDG_STATE_HOME/arriero/deployment.json`, mode 0600) holds the gateway's URL and key, and of a Ray that was started
here its process, address and token.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from actors.measurements import state_directory
from scheduler.errors import Rejected, Unavailable

LOCAL = "local"
START_TIMEOUT_S = 90.0
REACH_TIMEOUT_S = 5.0  # of a machine in the same network
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):(\d{1,5})")
END_TIMEOUT_S = 20.0
TURN_TIMEOUT_S = 400.0  # longer than another command may take: Ray's start, and what `actors.turn` waits
OBJECT_STORE_BYTES = 100_000_000  # tokens and readings stay far below what goes through the object store
UNUSED = ("ray.util.client.server", "dashboard/dashboard.py")
"""Ray's server for remote drivers (49 MiB), and what is left of a dashboard that was not wanted (75 MiB)."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What keeps our own Ray on loopback. Else Ray takes 127.0.0.1 for the machine's address in the network, and all of its
processes listen on every interface. Ray means it for firewalls of other systems; it must be set on both sides, in the
head and in whoever connects, before Ray is imported."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """The last deployment made from this account. Empty strings and zeros for what does not apply."""

    url: str = ""
    api_key: str = ""
    ray_address: str = ""
    ray_pid: int = 0
    ray_started_at_s: float = 0.0
    ray_token: str = ""

    @property
    def ray_process(self) -> psutil.Process | None:
        """The Ray that was started here, if it still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.ray_pid) if self.ray_pid else None
            if (
                process
                and abs(process.create_time() - self.ray_started_at_s) < 1
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                return process
        return None


def state_path() -> Path:
    return state_directory() / "deployment.json"


def recall() -> Remembered:
    """What was remembered; empty when nothing was, or when the file is not ours to understand."""
    try:
        return Remembered(**json.loads(state_path().read_text()))
    except (OSError, ValueError, TypeError):
        return Remembered()


def remember(state: Remembered) -> None:
    path = state_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(state), file)


def forget() -> None:
    state_path().unlink(missing_ok=True)


@contextlib.contextmanager
def alone(say: Callable[[str], object]) -> Iterator[None]:
    """Keep other commands of this account from starting or ending a Ray; waits for one that does, and says so.

    Raises Unavailable that names it when it has not ended after `TURN_TIMEOUT_S`.
    """
    path = state_path().with_name("up.lock")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + TURN_TIMEOUT_S
    with path.open("a+") as lock:  # closing it unlocks it, and so does the end of this process
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                other = f"process {lock.read() or '?'}"
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{other} has been starting or stopping Arriero for more than {TURN_TIMEOUT_S:.0f} s; "
                    "wait for it, or end it and try again"
                )
            say(f"waiting for {other}, which starts or stops Arriero")
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def connect(address: str | None, *, start: bool) -> Remembered:
    """Connect this process to Ray as a driver; returns what is to be remembered of it.

    In this order: `address` or RAY_ADDRESS ("local": none but a Ray of our own); a Ray that was started from here; one
    that this account runs on this machine; and, with `start`, a new one. Raises Unavailable when there is none,
    Rejected when there are several to choose from. Ray reads its token when it is first imported: import it after this.
    """
    chosen = cluster_address(address)
    known = recall()
    if chosen in ("", LOCAL, known.ray_address) and known.ray_process:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=known.ray_token, **LOOPBACK)
        _init(known.ray_address)
        return known
    running = clusters() if not chosen else []
    if len(running) > 1:
        raise Rejected(
            f"several Ray clusters run here ({', '.join(running)}); name one with --address, or --address local"
        )
    if (chosen and chosen != LOCAL) or running:
        _init(chosen or running[0])
        return Remembered(ray_address=chosen or running[0])
    if not start:
        raise Unavailable("no Ray cluster runs on this machine; `arriero up` starts one")
    return start_ray()


def cluster_address(address: str | None) -> str:
    """`address`, or RAY_ADDRESS unless that names a job server, as `ray job submit` wants it; empty: none is named.

    Raises Rejected for an `address` that names one, and for what is no address of a cluster.
    """
    if address and address.startswith(("http://", "https://")):
        raise Rejected(f"{address} is a Ray job server; --address needs the cluster itself, as HOST:6379")
    named = address or os.environ.get("RAY_ADDRESS", "")
    if named.startswith(("http://", "https://")):
        return ""
    if named not in ("", "auto", LOCAL) and not _HOST_AND_PORT.fullmatch(named):
        raise Rejected(f"{named!r} is not the address of a Ray cluster; write it as HOST:6379")
    return named


def clusters() -> list[str]:
    """GCS addresses ("host:port") of the Ray clusters that this account runs a node of on this machine."""
    found = set()
    for process in psutil.process_iter(["name", "cmdline", "uids"]):
        if process.info["name"] == "raylet" and process.info["uids"] and process.info["uids"].real == os.getuid():
            for argument in process.info["cmdline"] or ():
                if argument.startswith("--gcs-address="):
                    found.add(argument.removeprefix("--gcs-address="))
    return sorted(found)


def start_ray() -> Remembered:
    """Start a Ray head of our own on loopback and connect to it. Takes 5 to 15 s."""
    token = secrets.token_hex(32)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, **LOOPBACK)
    port = free_port()
    log = state_path().with_name("ray.log")
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    process = _ray_head(port, log)
    state = Remembered(
        ray_address=f"127.0.0.1:{port}",
        ray_pid=process.pid,
        ray_started_at_s=psutil.Process(process.pid).create_time(),
        ray_token=token,
    )
    try:
        _await_head(process, port, log)
        _end_unused(process.pid)
        _init(state.ray_address)
    except BaseException:
        end_ray(state)
        raise
    return state


def _await_head(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _listens(port) or "Ray runtime started" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise Unavailable(f"Ray did not start (log: {log}):\n{tail}")
        time.sleep(0.1)


def _end_unused(head_pid: int) -> None:
    """End what `ray start` has no switch for. It takes the end by SIGTERM for intended, and watches the others on."""
    for child in psutil.Process(head_pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(argument.endswith(UNUSED) for argument in child.cmdline()):
                child.terminate()


def end_ray(state: Remembered) -> None:
    """End the Ray that was started here, and with it all its processes."""
    process = state.ray_process
    if process is None:
        return
    family = [process, *process.children(recursive=True)]
    process.terminate()  # `ray start --block` ends its own processes
    _, alive = psutil.wait_procs(family, timeout=END_TIMEOUT_S)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(alive, timeout=END_TIMEOUT_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ray_head(port: int, log: Path) -> subprocess.Popen[bytes]:
    source = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        # Ray must neither lower the priority of runners nor kill the newest of them when memory is short.
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MALLOC_ARENA_MAX": "2",  # see setup/ray.env
    }
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        f"--port={port}", "--node-ip-address=127.0.0.1", "--disable-usage-stats",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--include-dashboard=false", "--no-monitor", "--include-log-monitor=false",
    ]  # fmt: skip
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _init(address: str) -> None:
    if found := _HOST_AND_PORT.fullmatch(address):
        try:  # Ray itself would try for ever
            socket.create_connection((found[1].strip("[]"), int(found[2])), REACH_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise Unavailable(f"no Ray cluster answers at {address}: {error}") from None
    if address.startswith("127.") and address in clusters():  # a Ray that knows itself as that
        os.environ.update(LOOPBACK)
    import ray

    from actors.names import NAMESPACE

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise Unavailable(f"cannot connect to the Ray cluster at {address}: {error}") from error
