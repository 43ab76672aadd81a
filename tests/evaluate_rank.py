"""Score rows as one of the ranks and write down every bit: `evaluate_rank.py GUARD ROWS FOLDER` (test_evaluate_ranks.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from guardtrain.config import Source
from guardtrain.data.sources import load_sources
from guardtrain.distributed.ranks import join, leave
from guardtrain.evaluate.shared import SharedScorer
from guardtrain.inference.guards import load_guard
from guardtrain.types import GuardExample, Mode

if __name__ == "__main__":
    model, data, out = sys.argv[1:]
    ranks = join(timeout_seconds=120)
    guard = load_guard(model, device="cpu")
    rows = [row for row in load_sources([Source(path=data)], "guard").examples if isinstance(row, GuardExample)]
    scorer = guard.scorer(pack_tokens=1000)
    own: list[int] = []
    score = scorer.score

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        for index, scored in score(*args, **kwargs):
            own.append(index)
            yield index, scored

    scorer.score = counted  # type: ignore[method-assign]
    by_index = dict(SharedScorer(scorer, ranks).score([row.prompt for row in rows], list(Mode)))
    lengths = scorer.lengths([row.prompt for row in rows])
    scored = [[by_index[index].reason, *(value.hex() for value in by_index[index].scores.values())] for index in range(len(rows))]
    found = {"scored": scored, "own": len(own), "tokens": sum(lengths[index] for index in own)}
    (Path(out) / f"{ranks.index}-of-{ranks.size}").write_text(json.dumps(found))
    leave()
