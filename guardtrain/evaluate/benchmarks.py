"""Read public guard benchmarks: `load_benchmark("xstest")` from Hugging Face, `load_benchmark("xstest=FILE")` from a copy.

Nothing of them is shipped; `benchmark_sets` says where they are and what is known of them.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.table import Table

from guardtrain.config import Source
from guardtrain.data.columns import GUARD_COLUMNS, check_label_map, short
from guardtrain.data.problems import Problem
from guardtrain.data.records import Record, read_records
from guardtrain.data.rows import Reading, guard_row
from guardtrain.errors import ConfigError, DataError
from guardtrain.evaluate.benchmark_sets import AXES, BENCHMARKS, Axis, Benchmark
from guardtrain.types import GuardExample, Label

__all__ = [
    "BENCHMARKS",
    "Axis",
    "Benchmark",
    "BenchmarkRows",
    "benchmarks_json",
    "benchmarks_table",
    "by_axis",
    "find_benchmark",
    "load_benchmark",
    "read_benchmark",
]

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class BenchmarkRows:
    """The rows of a benchmark. left_out: how many rows its own rules leave out, by why."""

    name: str
    benchmark: Benchmark
    examples: list[GuardExample] = field(repr=False)
    left_out: Mapping[str, int]


def load_benchmark(argument: str) -> list[GuardExample]:
    """The rows of a benchmark, `NAME` or `NAME=PATH`; see `read_benchmark`."""
    return read_benchmark(argument).examples


def read_benchmark(argument: str) -> BenchmarkRows:
    """Read `NAME` from Hugging Face, or `NAME=PATH` from a file, a folder with the set's files, or a saved `datasets` folder.

    Raises ConfigError for an unknown name, DataError when the set cannot be read, a column is missing or a row is broken.
    """
    name, _, path = argument.partition("=")
    benchmark = find_benchmark(name)
    examples: list[GuardExample] = []
    left_out: Counter[str] = Counter()
    for part, records in _parts(name, benchmark, path or None):
        reading = _reading(name, part)
        for record in _whole(records, name, benchmark, path):
            values = _in_our_names(record, part, benchmark)
            if isinstance(values, str):
                left_out[values] += 1
                continue
            example, problems = guard_row(Record(record.where, values), reading)
            if example is None:
                raise _refusal(problems[0])
            examples.append(example)
    _check_classes(argument, benchmark, examples)
    return BenchmarkRows(name, benchmark, examples, left_out)


def find_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`. Raises ConfigError with the nearest names."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=3, cutoff=0.5) or BENCHMARKS
        raise ConfigError(f"no benchmark is called {name!r}", expected=" or ".join(near) if len(near) < 4 else ", ".join(near))
    return BENCHMARKS[name]


def benchmarks_json(benchmarks: Mapping[str, Benchmark]) -> list[dict[str, Any]]:
    """For machines: what is known of each set."""
    return [
        {
            "name": name,
            "title": benchmark.title,
            "axis": benchmark.axis,
            "classes": list(benchmark.classes),
            "hub": sorted({part.path for part in benchmark.hub}),
            "files": _file_names(benchmark),
            "licence": benchmark.licence,
            "headline": list(benchmark.headline),
            "verified": benchmark.verified,
            "caveats": list(benchmark.caveats),
        }
        for name, benchmark in benchmarks.items()
    ]


def benchmarks_table(benchmarks: Mapping[str, Benchmark]) -> Table:
    """For people: one line for each set, apart by axis."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("axis", "name", "classes", "licence", "what to know"):
        table.add_column(heading, overflow="fold")
    for axis, found in by_axis(benchmarks).items():
        for number, (name, benchmark) in enumerate(found.items()):
            classes = "both" if len(benchmark.classes) > 1 else str(benchmark.classes[0])
            table.add_row("" if number else axis, name, classes, benchmark.licence, "; ".join(benchmark.caveats))
    return table


def by_axis(items: Mapping[str, Item]) -> dict[Axis, dict[str, Item]]:
    """What is kept by benchmark name (evaluations, or `BENCHMARKS` itself), apart by axis: never one table, never one mean."""
    grouped: dict[Axis, dict[str, Item]] = {}
    for axis in AXES:
        found = {name: item for name, item in items.items() if find_benchmark(name).axis == axis}
        if found:
            grouped[axis] = found
    return grouped


def _parts(name: str, benchmark: Benchmark, path: str | None) -> Iterator[tuple[Source, Iterator[Record | Problem]]]:
    """Each part of a set and its records."""
    if benchmark.assemble is not None:
        yield benchmark.files[0], benchmark.assemble(_folder(name, benchmark, path))
        return
    if path is None:
        for part in benchmark.hub:
            yield part, read_records(part.path, part.split, part.config, benchmark.revision)
        return
    for part in _copied_parts(name, benchmark, path):
        yield part, read_records(part.path, part.split)


def _copied_parts(name: str, benchmark: Benchmark, path: str) -> Sequence[Source]:
    folder = Path(path).expanduser()
    # One configuration each: a saved folder keeps splits apart, not configurations.
    has_splits = len({part.split for part in benchmark.hub}) == len(benchmark.hub)
    is_saved_split = len(benchmark.hub) == 1 and (folder / "dataset_info.json").is_file()
    if is_saved_split or (has_splits and (folder / "dataset_dict.json").is_file()):
        return [replace(part, path=path) for part in benchmark.hub]
    if folder.is_dir():
        _folder(name, benchmark, path)
        return [replace(part, path=str(folder / part.path)) for part in benchmark.files]
    if len(benchmark.files) > 1:
        raise _no_folder(name, benchmark, path)
    return [replace(benchmark.files[0], path=path)]


def _folder(name: str, benchmark: Benchmark, path: str | None) -> Path:
    """The folder `path`, when every file of the set is in it."""
    folder = Path(path or "").expanduser()
    missing = [file for file in _file_names(benchmark) if not (folder / file).is_file()]
    if path is None or missing:
        raise _no_folder(name, benchmark, path)
    return folder


def _no_folder(name: str, benchmark: Benchmark, path: str | None) -> DataError:
    what = f"{name} is not on Hugging Face" if path is None else f"not a copy of {name}"
    expected = f"{name}=FOLDER with {' and '.join(_file_names(benchmark))}"
    return DataError(what, where=path, expected=expected)


def _file_names(benchmark: Benchmark) -> list[str]:
    return [part.path for part in benchmark.files]


def _reading(name: str, part: Source) -> Reading:
    ours = {field: field for field in GUARD_COLUMNS}
    return Reading(ours, check_label_map(part.labels, name), name, Label(part.label) if part.label else None)


def _whole(records: Iterator[Record | Problem], name: str, benchmark: Benchmark, path: str) -> Iterator[Record]:
    """The records, when none is broken: a figure over the rows that could be read would mislead."""
    terms = "accept its terms on huggingface.co, or " if benchmark.licence.startswith("gated") else ""
    for item in records:
        if isinstance(item, Problem):
            raise _refusal(item, hint=None if path else f"{terms}read a copy: {name}=PATH")
        yield item


def _refusal(problem: Problem, hint: str | None = None) -> DataError:
    return DataError(f"{problem.cause}: {problem.what}", where=problem.where, hint=hint)


def _in_our_names(record: Record, part: Source, benchmark: Benchmark) -> dict[str, Any] | str:
    """The row in our names, or why it is none of the test."""
    if benchmark.assemble is not None:
        return record.values
    required = benchmark.needs or tuple(part.columns[name] for name in ("prompt", "label") if name in part.columns)
    missing = [need for need in required if not any(name in record.values for name in need.split("|"))]
    if missing:
        wanted = ", ".join(need.replace("|", " or ") for need in missing)
        found = ", ".join(short(column) for column in list(record.values)[:40])
        hint = None if benchmark.verified else "what this set's columns are called could not be verified"
        raise DataError("missing columns", where=record.where, expected=wanted, found=f"the columns {found}", hint=hint)
    if benchmark.row is not None:
        values = benchmark.row(record.values)
    else:
        values = {ours: record.values.get(theirs) for ours, theirs in part.columns.items()}
    is_blank = isinstance(values, dict) and not str(values["prompt"] or "").strip()
    return "empty prompt" if is_blank else values


def _check_classes(argument: str, benchmark: Benchmark, examples: Sequence[GuardExample]) -> None:
    found = {example.label for example in examples}
    if found != set(benchmark.classes):
        labels = " and ".join(sorted(found)) or "no"
        expected = " and ".join(sorted(benchmark.classes))
        raise DataError("not the rows of this set", where=argument, expected=f"{expected} rows", found=f"{labels} rows")
