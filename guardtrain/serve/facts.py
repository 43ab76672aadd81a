"""What a backend tells of its guard once that is loaded: all that a verdict depends on beside the weights. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardtrain.data.template import PlainText
from guardtrain.inference.calibration import Calibration

if TYPE_CHECKING:
    from guardtrain.data.template import PlainEncoder
    from guardtrain.inference.guards import GuardSettings


@dataclass(frozen=True, kw_only=True)
class GuardFacts:
    """policy: the text, or a hash of it. modes: that it was trained in. cascade: the band. encoder: of untrusted text.

    max_prompt_tokens: as in training; longer prompts are read in chunks.
    """

    policy: str
    modes: tuple[str, ...]
    calibration: Calibration | None
    cascade: tuple[float, float] | None
    max_prompt_tokens: int
    encoder: PlainText

    @classmethod
    def of(cls, settings: GuardSettings, encoder: PlainEncoder) -> GuardFacts:
        """Of a guard that was loaded."""
        return cls(
            policy=_short_hash(settings.policy),
            modes=settings.modes,
            calibration=settings.calibration,
            cascade=settings.cascade,
            max_prompt_tokens=settings.max_prompt_tokens,
            encoder=encoder,
        )

    def with_modes(self, modes: Collection[str]) -> GuardFacts:
        """Where the backend cannot run all that the guard was trained in."""
        return replace(self, modes=tuple(mode for mode in self.modes if mode in modes))

    @property
    def threshold_version(self) -> str:
        """Of the calibration, its date and a short hash; "uncalibrated" without one."""
        if self.calibration is None:
            return "uncalibrated"
        text = json.dumps([self.calibration.to_json(), self.cascade], sort_keys=True)
        return f"{self.calibration.date}-{_short_hash(text)}"

    def to_json(self) -> dict[str, Any]:
        """What goes from one process to another."""
        return {
            "policy": self.policy,
            "modes": self.modes,
            "calibration": self.calibration.to_json() if self.calibration else None,
            "cascade": self.cascade,
            "max_prompt_tokens": self.max_prompt_tokens,
            "encoder": {"spec": self.encoder.spec, "forbidden_ids": sorted(self.encoder.forbidden_ids)},
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> GuardFacts:
        """The inverse of `to_json`."""
        return cls(
            policy=tree["policy"],
            modes=tuple(tree["modes"]),
            calibration=Calibration.from_json(tree["calibration"]) if tree["calibration"] else None,
            cascade=tuple(tree["cascade"]) if tree["cascade"] else None,
            max_prompt_tokens=tree["max_prompt_tokens"],
            encoder=PlainText(**tree["encoder"]),
        )


def name_of(model: str | Path) -> str:
    """What a model is called where others read it: an id, or the run's name, without where it lies on this machine."""
    path = Path(model)
    if not path.exists():
        return str(model)
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
