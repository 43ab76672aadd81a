"""Export a small run, which loads every library, then a large one, and print by how much its memory grew at most.

python export_memory.py SMALL_RUN LARGE_RUN OUT SHARD_BYTES
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from memory import peak_growth_bytes
from rich.console import Console

from guardtrain.train.export import Export, ExportOptions, export_run


def export(run: str, out: str, shard_bytes: str) -> Export:
    options = ExportOptions(to="merged", shard_bytes=int(shard_bytes), out=Path(out))
    return export_run(Path(run), options, Console(file=io.StringIO()))


def main(small: str, large: str, out: str, shard_bytes: str) -> None:
    export(small, f"{out}-small", "1000")
    done: list[Export] = []
    growth = peak_growth_bytes(lambda: done.append(export(large, out, shard_bytes)))
    print(json.dumps({"growth": growth, **done[0].to_json()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
