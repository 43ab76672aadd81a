"""Imports point down only, and what answers `--help` loads nothing heavy."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "guardtrain"
# Lowest first. Packages of one layer may use each other, except where they are listed as strangers.
LAYERS = (
    {"types", "errors", "streams", "json_files", "environment", "workers", "allocator"},
    {"config", "overrides", "options", "terminal", "hub"},
    {"data", "model", "distributed", "secure"},
    {"inference"},
    {"train", "evaluate", "serve", "prepare", "plan", "publish"},
    {"bench", "compare"},
    {"cli"},
)
STRANGERS = {"data", "model", "distributed"}  # and secure, which may use them, is not for them to use
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
HEAVY = ("torch", "transformers", "numpy", "sklearn", "datasets", "pandas", "accelerate", "peft")


def part_of(module: str) -> str:
    """guardtrain.data.packing -> data; guardtrain -> the empty name."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            names = [f".{name.name}" for name in node.names] if node.module == "guardtrain" else [""]
            yield from ((f"{node.module}{name}", node.lineno) for name in names)


def violations(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).with_suffix("").parts[0]
        if path.stem in {"__init__", "__main__"} and (own == path.stem or path.stem == "__main__"):
            continue  # the package itself, and `python -m`, which starts the command line
        if own not in LEVEL:
            yield f"{path}: {own} has no layer; add it to the picture in the README and here"
            continue
        for module, line in imports(path):
            other = part_of(module) if module.split(".")[0] == "guardtrain" else ""
            if other and other not in LEVEL:
                continue  # a name of the package itself, such as __version__
            is_strange = other != own and own in STRANGERS and other in STRANGERS | {"secure"}
            if other and (LEVEL[other] > LEVEL[own] or is_strange):
                yield f"{path}:{line}: {own} imports {other}"


def test_imports_point_down_only() -> None:
    assert list(violations(PACKAGE)) == []


def test_an_import_that_points_up_is_seen(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.py").write_text(
        "def f():\n    from guardtrain.train.run import run\nimport guardtrain.model.load\nimport guardtrain.secure\n"
    )
    (tmp_path / "types.py").write_text("from guardtrain import config\n")
    (tmp_path / "novel.py").write_text("")
    found = " ".join(violations(tmp_path))
    for expected in (
        "rows.py:2: data imports train",
        "rows.py:3: data imports model",
        "rows.py:4: data imports secure",
        "types.py:1: types imports config",
        "novel",
    ):
        assert expected in found


@pytest.mark.parametrize(
    "module", ["guardtrain", "guardtrain.config", "guardtrain.overrides", "guardtrain.cli", "guardtrain.serve"]
)
def test_the_core_loads_nothing_heavy(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"no {module} yet")
    assert heavy_modules_after(f"import {module}") == []


def test_help_loads_nothing_heavy() -> None:
    if importlib.util.find_spec("guardtrain.cli") is None:
        pytest.skip("no command line yet")
    code = (
        "import sys, runpy; from importlib.metadata import entry_points\n"
        "(entry,) = entry_points(group='console_scripts', name='guardtrain')\n"
        "sys.argv = ['guardtrain', '--help']\n"
        "try:\n    entry.load()()\nexcept SystemExit as exit:\n    assert not exit.code\n"
    )
    assert heavy_modules_after(code) == []


def heavy_modules_after(code: str) -> list[str]:
    report = f"{code}\nimport sys\nprint('HEAVY', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]
