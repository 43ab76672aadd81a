"""`guardtrain data mine`: rows on which a guard changes its mind from one sampled reason to the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from guardtrain.data.keys import row_key
from guardtrain.errors import ConfigError, DataError
from guardtrain.evaluate.files import PACK_TOKENS, check_guard
from guardtrain.inference.guards import LoadedGuard, load_guard, model_folder
from guardtrain.options import check_new
from guardtrain.prepare.candidates import Candidate, read_candidates
from guardtrain.prepare.written import rows_of, write_lines
from guardtrain.types import GuardExample, Label, Mode


@dataclass(frozen=True, kw_only=True, slots=True)
class MineOptions:
    """How to sample: `samples` reasons for each row."""

    samples: int = 8
    temperature: float = 0.7
    seed: int = 0
    max_prompt_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mined:
    """How many rows there were, how many flip, how many every sample gets wrong, and how many an earlier run had sampled."""

    rows: int
    flipping: int
    always_wrong: int
    resumed: int

    def to_json(self) -> dict[str, int]:
        """Plain data."""
        return {"rows": self.rows, "flipping": self.flipping, "always_wrong": self.always_wrong, "resumed": self.resumed}


def mine(
    model: str,
    files: Sequence[str],
    out: Path,
    options: MineOptions,
    *,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    console: Console,
) -> Mined:
    """Write the rows whose verdict flips between samples to `out`, each with how often it was flagged; no file without any.

    What was sampled stands in `OUT.partial` until then, so that a run that was stopped goes on where it was.
    Raises DataError for a row that cannot be read or is too long, ConfigError for a guard that does not reason, an `out` that is
    there already, and a partial file of other settings.
    """
    check_new("--out", out)
    read = read_candidates(files, "guard", columns or {}, labels or {})
    if read.broken:
        raise DataError(read.broken[0].what, where=read.broken[0].where, hint="guardtrain data check lists every problem")
    guard = load_guard(model)
    if Mode.ON not in guard.settings.modes:
        raise ConfigError("this guard does not reason", where=model, expected="mode on", found=", ".join(guard.settings.modes))
    examples = [row.example for row in read.candidates if isinstance(row.example, GuardExample)]
    check_guard(guard, examples, ["on"], options.max_prompt_tokens)
    journal = _Journal.open(out.with_name(f"{out.name}.partial"), _settings(model, guard, options))
    resumed = sum(_key(example) in journal.flagged for example in examples)
    _sample(guard, examples, options, journal, console)
    flagged = [journal.flagged[_key(example)] for example in examples]
    hard = [(row, count) for row, count in zip(read.candidates, flagged, strict=True) if 0 < count < options.samples]
    if hard:
        _write(out, hard, model, options)
    journal.path.unlink()
    wrong = sum(
        count == (0 if row.label is Label.MALICIOUS else options.samples) for row, count in zip(examples, flagged, strict=True)
    )
    return Mined(rows=len(examples), flipping=len(hard), always_wrong=wrong, resumed=resumed)


def _sample(
    guard: LoadedGuard, examples: Sequence[GuardExample], options: MineOptions, journal: _Journal, console: Console
) -> None:
    """Sample every row that the journal has not, each once, and note in how many samples it is flagged."""
    left = {key: example for example in examples if (key := _key(example)) not in journal.flagged}
    keys, prompts = list(left), [example.prompt for example in left.values()]
    threshold = guard.settings.thresholds.get("on", 0.0)
    drawn = guard.scorer(pack_tokens=PACK_TOKENS).sample(
        prompts, samples=options.samples, temperature=options.temperature, seed=options.seed
    )
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("sample", total=len(prompts))
        for index, scored in drawn:
            journal.note(keys[index], sum(each.scores[Mode.ON] >= threshold for each in scored))
            progress.advance(task)


def _write(out: Path, hard: Sequence[tuple[Candidate, int]], model: str, options: MineOptions) -> None:
    facts = {"model": Path(model).name, "samples": options.samples, "temperature": options.temperature, "seed": options.seed}
    rows = rows_of([candidate for candidate, _ in hard])
    lines = [{**row, "mined": {**facts, "flagged": count}} for row, (_, count) in zip(rows, hard, strict=True)]
    partial = out.with_name(f".{out.name}.tmp")
    write_lines(partial, lines)
    partial.replace(out)


def _settings(model: str, guard: LoadedGuard, options: MineOptions) -> dict[str, Any]:
    """All that a draw depends on. written: when the guard's newest file was, in ns; a guard trained anew is another one."""
    folder = model_folder(model)
    written = max((file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()), default=0) if folder else 0
    return {
        "model": model,
        "written": written,
        "threshold": guard.settings.thresholds.get("on", 0.0),
        "samples": options.samples,
        "temperature": options.temperature,
        "seed": options.seed,
    }


def _key(example: GuardExample) -> str:
    return hashlib.blake2b(row_key(example).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class _Journal:
    """What was sampled so far: by row, in how many samples it was flagged. One line for each, written at once."""

    path: Path
    flagged: dict[str, int]

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any]) -> _Journal:
        """The journal in `path`, or a new one. Raises ConfigError where it is of other settings."""
        lines = _whole_lines(path)
        if lines and lines[0] != settings:
            changed = [name for name in settings if lines[0].get(name) != settings[name]]
            hint = "delete it to begin anew, or go on with the old settings"
            raise ConfigError("begun with other settings", where=str(path), found=f"another {', '.join(changed)}", hint=hint)
        flagged = {line["row"]: line["flagged"] for line in lines[1:]}
        # Anew, for the last line of a run that was killed may be half a one.
        partial = path.with_name(f".{path.name}.tmp")
        write_lines(partial, [settings, *({"row": row, "flagged": count} for row, count in flagged.items())])
        partial.replace(path)
        return cls(path, flagged)

    def note(self, row: str, flagged: int) -> None:
        """Keep one row's count, on disk too."""
        self.flagged[row] = flagged
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": row, "flagged": flagged}) + "\n")


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text.split("\n")[:-1]]
    except ValueError as error:
        raise ConfigError("not a partial file of data mine", where=str(path), hint="delete it to begin anew") from error
