"""What `ray job submit --working-dir .` packs, asked of Ray's own packer: the code, and never a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from zipfile import ZipFile

from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).resolve().parents[2]


def packed(folder: Path, files: list[str]) -> set[str]:
    """Names of those of `files` that Ray packs from `folder` with this repository's ignore files."""
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    target = folder.parent / "package.zip"
    create_package(str(folder), target, include_gitignore=True)
    with ZipFile(target) as package:
        return set(package.namelist()) & set(files)


def test_models_stay_where_they_are(tmp_path: Path) -> None:
    models = ["a.gguf", "deep/down/b-00001-of-00005.gguf", "C.GGUF", "d.gguf.part", "models/e.bin", "f.safetensors"]
    code = ["arriero/cli/main.py", "scheduler/core.py", "pyproject.toml"]
    made = [".venv/bin/python", "scheduler/__pycache__/core.pyc", "arriero.egg-info/PKG-INFO"]
    (tmp_path / "checkout").mkdir()
    assert packed(tmp_path / "checkout", [*models, *code, *made]) == set(code)


def test_packages_named_models_are_code(tmp_path: Path) -> None:
    (tmp_path / "checkout").mkdir()
    assert packed(tmp_path / "checkout", ["scheduler/models/shape.py"]) == {"scheduler/models/shape.py"}
