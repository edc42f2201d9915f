"""cluster.yaml passes Ray's own validation, and avoids what is known to bite with `provider: local`."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from arriero.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "~/.ray/auth_token"


def raw_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return config


def settings() -> dict[str, str]:
    lines = [line for line in (ROOT / "setup" / "ray.env").read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split("=", 1) for line in lines)


def start_commands() -> dict[str, str]:
    """The one `ray start` command of the head and of a worker."""
    config = raw_config()
    found = {}
    for kind in ("head", "worker"):
        (found[kind],) = (line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line)
    return found


def test_ray_accepts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    prepared = prepare_config(copy.deepcopy(raw_config()))
    validate_config(prepared)
    workers = len(raw_config()["provider"]["worker_ips"])
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == workers


def test_that_validation_would_notice_a_misspelt_key() -> None:
    config = {**prepare_config(copy.deepcopy(raw_config())), "head_start_commands": []}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


def test_all_that_the_machines_need_is_sent_and_nothing_else_is_read() -> None:
    mounts: dict[str, str] = dict(raw_config()["file_mounts"])
    assert mounts.pop(TOKEN) == TOKEN
    assert {remote: f"~/arriero/{local}" for remote, local in mounts.items()} == {remote: remote for remote in mounts}
    for local in mounts.values():
        assert (ROOT / local).exists(), f"cluster.yaml sends {local}, which is not there"
    assert {"scheduler", "actors", "arriero", "setup", "requirements", "Makefile", "pyproject.toml"} <= {
        *mounts.values()
    }


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_each_ray_starts_with_the_common_settings(kind: str) -> None:
    command = start_commands()[kind]
    assert command.startswith("set -a; . ~/arriero/setup/ray.env; set +a;")
    assert "~/arriero/.venv/bin/ray start" in command, "a bare `ray` is not on the PATH of a fresh login shell"
    assert "--num-gpus" not in command, "all machines share the command, and they have different cards"


def test_the_head_hands_the_launchers_settings_to_the_autoscaler() -> None:
    command = start_commands()["head"]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in command
    assert "RAY_gcs_storage=rocksdb" in command
    assert "--dashboard-host=127.0.0.1" in command
    assert "--address=$RAY_HEAD_IP:6379" in start_commands()["worker"]


def test_arriero_starts_on_the_head_after_ray_and_lets_go() -> None:
    commands = raw_config()["head_start_ray_commands"]
    assert "ray start" in commands[-2]
    assert re.search(r"python -m arriero up --detach\b", commands[-1])
    assert "RAY_ADDRESS=" in commands[-1], "several clusters may be visible on one machine"


def test_arriero_knows_the_arguments_that_it_is_given() -> None:
    arguments = raw_config()["head_start_ray_commands"][-1].partition("-m arriero ")[2].split()
    group = typer.main.get_command(app)
    with group.make_context("arriero", list(arguments)) as context:
        name, verb, rest = group.resolve_command(context, arguments)
        given = verb.make_context(name, rest, parent=context).params
    assert given["detach"] is True
    assert given["models"] == ["~/models"]


@pytest.mark.parametrize("key", ["setup_commands", "head_start_ray_commands", "worker_start_ray_commands"])
def test_the_commands_are_valid_shell(key: str) -> None:
    for command in raw_config()[key]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_way_around_the_second_autoscaler_is_told() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    launches = re.findall(r"^.*\bray (?:up|down) cluster\.yaml.*$", text, re.MULTILINE)
    assert launches
    assert all("RAY_UP_enable_autoscaler_v2=0" in line for line in launches)


def test_the_settings_are_ones_that_ray_knows() -> None:
    """A misspelt setting is ignored by Ray without a word: look for each name in its programs."""
    core = Path(ray.__file__).parent
    programs = [core / "core/src/ray/raylet/raylet", core / "core/src/ray/gcs/gcs_server"]
    known = b"".join(path.read_bytes() for path in programs)
    python_side = {"RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"}
    names = {name for name in settings() if name.startswith("RAY_")} | {"RAY_gcs_storage", "RAY_gcs_storage_path"}
    for name in names - python_side:
        assert name.removeprefix("RAY_").encode() in known, f"Ray {ray.__version__} has no setting {name}"


def test_only_those_with_the_token_may_join() -> None:
    assert settings()["RAY_AUTH_MODE"] == "token"


def test_the_settings_suit_a_shell_and_systemd_alike() -> None:
    for name, value in settings().items():
        assert re.fullmatch(r"[A-Za-z_]+", name)
        assert re.fullmatch(r"[\w/.:-]+", value), f"{name}: quotes, spaces and $ mean different things to the two"


def test_the_node_script_is_valid_and_executable() -> None:
    script = ROOT / "setup" / "node"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
