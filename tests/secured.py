"""A modules.json for tiny models, as a search would have written it, and instruct rows for runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from guardtrain.config import ModelConfig
from guardtrain.secure.probe import ProbeFigures
from guardtrain.secure.result import RobustModules, model_fingerprint
from guardtrain.secure.units import KINDS, Unit

FIGURES = ProbeFigures(0.9, 0.95, 1.5, 0.95)
UNITS = tuple(Unit(layer, kind) for layer in range(2) for kind in KINDS)


def is_value_or_down(unit: Unit) -> bool:
    """Some units of both layers."""
    return unit.kind in {"v_proj", "down_proj"}


def write_modules(path: Path, model: str, is_robust: Callable[[Unit], bool] = is_value_or_down) -> Path:
    """The result of a search on a two-layer model, of which `is_robust` says what it found."""
    RobustModules(
        units=dict.fromkeys(UNITS, 0.0),
        robust=tuple(filter(is_robust, UNITS)),
        joint_drop=0.01,
        strength=0.5,
        tau=0.02,
        untouched=FIGURES,
        checks=(),
        settings={"seeds": 3},
        model=model,
        model_hash=model_fingerprint(ModelConfig(name=model)),
        data_hash="ab",
        made="2026-11-22",
    ).write(path)
    return path


def write_questions(path: Path, count: int = 24, subject: str = "port") -> Path:
    """Instruct rows with a system turn each."""
    rows = [
        [
            {"role": "system", "content": "Be brief and kind."},
            {"role": "user", "content": f"What does {subject} {number} carry?"},
            {"role": "assistant", "content": f"The {subject} {number} carries a service of its own."},
        ]
        for number in range(count)
    ]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows) + "\n", encoding="utf-8")
    return path
