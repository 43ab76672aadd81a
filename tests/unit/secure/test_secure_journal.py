"""What is measured outlives whatever happens, and is never mixed with another search's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from guardtrain.errors import ConfigError
from guardtrain.secure.journal import Journal
from guardtrain.secure.probe import ProbeFigures
from guardtrain.secure.search import REPORT, Task
from guardtrain.secure.units import Unit

A, B = Unit(0, "q_proj"), Unit(3, "v_proj")
TASKS = [Task(), Task((A,), 0.1, 0), Task((A,), 0.1, 1), Task((A,), 0.2, 1), Task((A, B), 0.1, 0), Task((A,), 0.1, 0, REPORT)]
FIGURES = [ProbeFigures(number / 7, number / 11, number / 13, number / 17) for number in range(len(TASKS))]


def filled(out: Path) -> Path:
    with Journal(out, {"model": "m", "seed": 0}) as journal:
        for task, figures in zip(TASKS, FIGURES, strict=True):
            journal.add(task, figures)
    return journal.path


def test_every_measurement_is_found_again_bit_for_bit(tmp_path: Path) -> None:
    path = filled(tmp_path / "modules.json")
    path.write_bytes(path.read_bytes() + b'{"key": "torn')
    with Journal(tmp_path / "modules.json", {"model": "m", "seed": 0}) as journal:
        assert [journal.find(task) for task in TASKS] == FIGURES
        assert journal.find(Task((B, A), 0.1, 0)) == FIGURES[4], "a set has no order"
        assert journal.find(Task((B,), 0.1, 0)) is None
        journal.add(Task((B,), 0.1, 0), FIGURES[1])
    with Journal(tmp_path / "modules.json", {"model": "m", "seed": 0}) as journal:
        assert len(journal.known) == len(TASKS) + 1


@pytest.mark.parametrize(("name", "value"), [("model", "n"), ("seed", 1)])
def test_another_search_is_refused_in_one_line(tmp_path: Path, name: str, value: object) -> None:
    path = filled(tmp_path / "modules.json")
    with pytest.raises(ConfigError, match=f"an unfinished search has other {name}") as error:
        Journal(tmp_path / "modules.json", {"model": "m", "seed": 0, name: value})
    assert f"delete {path} to begin anew" in str(error.value)


def test_only_one_search_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from guardtrain.secure.journal import Journal; from guardtrain.errors import ConfigError\n"
        "try: Journal(pathlib.Path(sys.argv[1]), {})\nexcept ConfigError as error: print(error)"
    )
    with Journal(tmp_path / "modules.json", {}):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "modules.json")], capture_output=True, text=True, check=True
        )
    assert "another search is writing this file" in done.stdout


def test_a_search_that_fails_before_it_knows_anything_leaves_nothing(tmp_path: Path) -> None:
    def fail(measurements: int) -> Path:
        with Journal(tmp_path / "modules.json", {}) as journal:
            for task in TASKS[:measurements]:
                journal.add(task, FIGURES[0])
            raise ZeroDivisionError
        return journal.path

    for measurements, files in ((1, []), (2, ["modules.json.journal"])):
        with pytest.raises(ZeroDivisionError):
            fail(measurements)
        assert [file.name for file in tmp_path.iterdir()] == files
