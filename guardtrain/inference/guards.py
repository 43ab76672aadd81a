"""A guard on disk: the folder `model/` of a run, with `guard.json` beside the weights; and any base model as an untuned guard."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from guardtrain.config import DEFAULT_POLICY, ModelConfig
from guardtrain.data.template import GuardTemplate
from guardtrain.errors import ModelError
from guardtrain.inference.calibration import Calibration
from guardtrain.inference.scorer import Scorer
from guardtrain.model.load import EXPORTED_GGUF, load_model, load_tokenizer, read_guard_json

GUARD_FILE = "guard.json"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """What `guard.json` holds: everything beside the weights that a verdict depends on.

    base_model, revision: the model argument the guard was trained from; needed again where only an adapter was saved.
    policy, modes, max_reason_tokens, max_prompt_tokens: as in training.
    calibration: thresholds and probabilities, and what they rest on; None for a guard that was never calibrated.
    cascade: the band of scores of mode off in which the guard has to reason, [low, high).
    collapsed: what the collapse watch last said, None when all was well.
    """

    base_model: str
    revision: str | None = None
    method: str = "full"
    policy: str = DEFAULT_POLICY
    modes: tuple[str, ...] = ("off", "on")
    max_reason_tokens: int = 64
    max_prompt_tokens: int = 2048
    calibration: Calibration | None = None
    cascade: tuple[float, float] | None = None
    collapsed: str | None = None
    format: int = FORMAT

    @property
    def thresholds(self) -> dict[str, float]:
        """By evaluation mode (off, on, both): flag when score >= threshold. Empty without calibration."""
        return self.calibration.thresholds if self.calibration else {}

    def write(self, folder: Path) -> None:
        """Write `guard.json` into `folder`, whole or not at all."""
        partial = folder / f".{GUARD_FILE}.tmp"
        partial.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(folder / GUARD_FILE)

    @classmethod
    def read(cls, folder: Path) -> GuardSettings:
        """The settings in `folder`. Raises ModelError when they are missing, broken or of a newer format."""
        raw = read_guard_json(folder)
        if raw.get("format") == 1:  # bare thresholds, of which nothing says where they come from: calibrate it anew
            raw = {key: value for key, value in raw.items() if key not in {"thresholds", "target_fpr"}} | {"format": FORMAT}
        if raw.get("format") != FORMAT:
            raise ModelError("unknown format", where=str(folder / GUARD_FILE), expected=str(FORMAT), found=str(raw.get("format")))
        try:
            calibration = Calibration.from_json(raw["calibration"]) if raw.get("calibration") else None
            cascade = tuple(raw["cascade"]) if raw.get("cascade") else None
            return cls(**{**raw, "modes": tuple(raw["modes"]), "calibration": calibration, "cascade": cascade})
        except (TypeError, KeyError, AttributeError) as error:
            raise ModelError("broken settings", where=str(folder / GUARD_FILE), found=str(error)) from error


@dataclass(frozen=True)
class LoadedGuard:
    """A loaded guard, ready to score. `is_trained` is false for a base model that was never tuned."""

    model: Any
    tokenizer: Any
    template: GuardTemplate
    settings: GuardSettings
    is_trained: bool

    def scorer(self, pack_tokens: int = 1024) -> Scorer:
        """A scorer over this guard; its policy cache holds the weights as they are now."""
        return Scorer(
            self.model,
            self.tokenizer,
            self.template,
            max_reason_tokens=self.settings.max_reason_tokens,
            pack_tokens=pack_tokens,
        )


def model_folder(name: str) -> Path | None:
    """The folder with `guard.json` that `name` means: a run, its model folder, an export or its GGUF file; else None."""
    path = Path(name)
    for folder in (path.parent,) if path.name == EXPORTED_GGUF else (path / "model", path):
        if (folder / GUARD_FILE).is_file():
            return folder
    return None


def load_guard(name: str, *, policy: str | None = None, revision: str | None = None, device: str | None = None) -> LoadedGuard:
    """Load a run, a model folder, or any base model as a guard, in float32 on a CPU and bfloat16 on a GPU.

    An adapter, of QLoRA too, is merged into the unquantised base model: that is what is measured and given a threshold.
    revision: of a base model. policy: replaces the saved one (base models: the default one).
    Raises ModelError when the model cannot be had.
    """
    tokenizer, settings = load_settings(name, policy=policy, revision=revision)
    folder = model_folder(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = _load_weights(name, folder, settings, dtype).to(device)
    model.eval()
    return LoadedGuard(model, tokenizer, GuardTemplate(tokenizer, settings.policy), settings, is_trained=folder is not None)


def load_settings(name: str, *, policy: str | None = None, revision: str | None = None) -> tuple[Any, GuardSettings]:
    """The tokenizer and the settings of what `load_guard` takes, for whoever runs its weights elsewhere. Raises ModelError."""
    folder = model_folder(name)
    settings = GuardSettings.read(folder) if folder else GuardSettings(base_model=name, revision=revision)
    if policy is not None:
        settings = replace(settings, policy=policy)
    return load_tokenizer(str(folder)) if folder else load_tokenizer(name, revision), settings


def load_saved(folder: Path, base: ModelConfig, dtype: torch.dtype) -> Any:
    """The model that training saved into `folder`: whole, or an adapter, which is merged into the unquantised `base`."""
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel

        return PeftModel.from_pretrained(load_model(base, dtype), str(folder)).merge_and_unload()
    return load_model(ModelConfig(name=str(folder)), dtype)


def _load_weights(name: str, folder: Path | None, settings: GuardSettings, dtype: torch.dtype) -> Any:
    if folder is None:
        return load_model(ModelConfig(name=name, revision=settings.revision), dtype)
    return load_saved(folder, ModelConfig(name=settings.base_model, revision=settings.revision), dtype)
