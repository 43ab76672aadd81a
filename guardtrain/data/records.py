"""Files to raw records, each with its address. Whatever cannot be read becomes a Problem, and reading goes on."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from guardtrain.data.problems import Cause, Problem

# Words that stand for the project's own rows, and their folders: pairs to learn from, and near-identical twins, a challenge
# set that no small model has solved.
STARTERS = {"starter": "starter", "starter-hard": "starter/hard"}


@dataclass(frozen=True, slots=True)
class Record:
    """One row as the file has it. where: ``file:line``; for formats without lines the number counts rows from 1."""

    where: str
    values: dict[str, Any]


Records = Iterator[Record | Problem]


def read_records(path: str, split: str = "train", config: str | None = None, revision: str | None = None) -> Records:
    """Yield every record of a file, a saved `datasets` folder, a Hugging Face id or a starter set, and every problem.

    split: which split of a folder or Hugging Face data set; config, revision: which configuration and commit of the latter.
    """
    empty = True
    try:
        for item in _open(path, split, config, revision):
            empty = False
            yield item
    except OSError as error:
        yield _file_problem(path, f"cannot be read: {error.strerror or error}")
        return
    if empty:
        yield Problem(where=path, cause=Cause.NO_ROWS, what="expected at least one row, found none")


def _open(path: str, split: str, config: str | None, revision: str | None) -> Records:
    if path in STARTERS:
        return _read_starter(STARTERS[path])
    file = Path(path).expanduser()
    if file.is_dir():
        return _read_saved(file, path, split)
    if file.is_file():
        reader = READERS.get(file.suffix.lower())
        accepted = ", ".join(READERS)
        return reader(file, path) if reader else iter([_file_problem(path, f"unknown kind of file, expected {accepted}")])
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and file.suffix.lower() not in READERS:
        return _read_hub(path, split, config, revision)
    return iter([_file_problem(path, "no such file or folder (a Hugging Face data set is OWNER/NAME)")])


def _file_problem(where: str, what: str) -> Problem:
    return Problem(where=where, cause=Cause.FILE, what=what)


def _broken(where: str, what: str, row: Any) -> Problem:
    return Problem(where=where, cause=Cause.BROKEN_ROW, what=what, row=row)


# JSON Lines


def _read_starter(name: str) -> Records:
    folder = resources.files("guardtrain").joinpath(*name.split("/"))
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".jsonl"):
            with entry.open("rb") as lines:
                yield from _json_lines(lines, f"{name}/{entry.name}")


def _read_jsonl(file: Path, name: str) -> Records:
    with file.open("rb") as lines:
        yield from _json_lines(lines, name)


def _json_lines(lines: Iterable[bytes], name: str) -> Records:
    # Bytes, because str.splitlines also splits at U+2028, U+0085 and others, which JSON text may hold.
    for number, raw in enumerate(lines, start=1):
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if raw.strip():
            yield _json_line(raw.rstrip(b"\r\n"), f"{name}:{number}")


def _json_line(raw: bytes, where: str) -> Record | Problem:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _broken(where, f"not UTF-8 (byte {error.start} of the line)", raw.decode("utf-8", "backslashreplace"))
    except (ValueError, RecursionError) as error:  # a ValueError that is no JSONDecodeError: a number of over 4,300 digits
        return _broken(where, f"expected a JSON object, found {_json_fault(error)}", raw.decode("utf-8"))
    return _object(value, where)


def _object(value: Any, where: str) -> Record | Problem:
    if isinstance(value, dict):
        return Record(where, value)
    return _broken(where, f"expected a JSON object, found {type(value).__name__}", value)


def _json_fault(error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "brackets nested too deeply" if isinstance(error, RecursionError) else "a number with thousands of digits"
    if error.msg.startswith("Unterminated string"):
        return "a line that ends inside a string"
    return f"broken JSON at column {error.colno} ({error.msg})"


# JSON


def _read_json(file: Path, name: str) -> Records:
    text = _text(file, name)
    if isinstance(text, Problem):
        yield text
        return
    position = _skip_blanks(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        yield _file_problem(name, "expected a JSON list of objects (one object a line is JSON Lines: name the file .jsonl)")
        return
    yield from _json_elements(text, position, name)


def _json_elements(text: str, position: int, name: str) -> Records:
    """Decode one element at a time, which json.loads cannot: it keeps no line numbers."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _skip_blanks(text, position + 1)
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            yield _file_problem(f"{name}:{at}", f"{_json_fault(error)}; the rest of the file was not read")
            return
        yield _object(value, f"{name}:{line}")
        position = _skip_blanks(text, position)
        if text[position : position + 1] == ",":
            position = _skip_blanks(text, position + 1)
        elif text[position : position + 1] != "]":
            break
    if text[position : position + 1] != "]" or text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        yield _file_problem(f"{name}:{line}", "expected `,` or the end of the list; the rest of the file was not read")


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _text(file: Path, name: str) -> str | Problem:
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return _file_problem(f"{name}:{line}", "not UTF-8: save the file as UTF-8")


# CSV


def _read_csv(file: Path, name: str) -> Records:
    text = _text(file, name)
    if isinstance(text, Problem):
        yield text
        return
    # The csv module refuses cells over 131,072 characters by default; ours are measured later, by the token budget.
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    for line, cells in _csv_cells(reader):
        where = f"{name}:{line}"
        if isinstance(cells, str):
            yield _broken(where, f"broken CSV: {cells}", "\n".join(text.split("\n")[line - 1 : reader.line_num]))
        elif header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                yield _file_problem(where, f"a column name is used twice: {', '.join(header)}")
                return
        elif len(cells) != len(header):
            yield _broken(where, f"expected {len(header)} cells, found {len(cells)}", cells)
        else:
            yield Record(where, dict(zip(header, cells, strict=True)))


def _csv_cells(reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (first line, cells or what is wrong) per record; a quoted cell may span lines."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, str(error)
            continue
        if cells:
            yield line, cells


# Parquet and datasets: imported where they are used, because each takes a second.


def _read_parquet(file: Path, name: str) -> Records:
    import pyarrow  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped,unused-ignore]

    try:
        table = pyarrow.parquet.ParquetFile(file)
        class_names = _class_names(table.schema_arrow.metadata or {})
        number = 0
        for batch in table.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Record(f"{name}:{number}", _named(values, class_names))
    except pyarrow.ArrowException as error:
        yield _file_problem(name, f"not a readable Parquet file: {_one_line(error)}")


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The label names that `datasets` keeps in a Parquet schema: an integer means nothing without them."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {key: item["names"] for key, item in features.items() if item.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _named(values: dict[str, Any], class_names: dict[str, list[str]]) -> dict[str, Any]:
    for key, names in class_names.items():
        number = values.get(key)
        if isinstance(number, int) and 0 <= number < len(names):
            values[key] = names[number]
    return values


def _read_saved(folder: Path, name: str, split: str) -> Records:
    import datasets  # type: ignore[import-untyped,unused-ignore]

    try:
        loaded = datasets.load_from_disk(str(folder))
    except FileNotFoundError:
        yield _file_problem(name, "a folder, but not one that `datasets.save_to_disk` wrote")
        return
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            yield _file_problem(name, f"no split {split!r}, found {', '.join(loaded)}")
            return
        loaded, name = loaded[split], f"{name}[{split}]"
    yield from _dataset_rows(loaded, name)


def _read_hub(name: str, split: str, config: str | None, revision: str | None) -> Records:
    import datasets  # type: ignore[import-untyped,unused-ignore]

    try:
        loaded = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the Hub client raises many kinds; each means that there is nothing to read
        what = f"no such file here, and not loaded from Hugging Face: {type(error).__name__}: {_one_line(error)}"
        yield _file_problem(name, what)
        return
    yield from _dataset_rows(loaded, f"{name}[{f'{config}/' if config else ''}{split}]")


def _dataset_rows(rows: Any, name: str) -> Records:
    class_names = {key: item.names for key, item in rows.features.items() if type(item).__name__ == "ClassLabel"}
    for number, values in enumerate(rows, start=1):
        yield Record(f"{name}:{number}", _named(dict(values), class_names))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


READERS: dict[str, Callable[[Path, str], Records]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
