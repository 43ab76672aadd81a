"""transformers' Trainer, subclassed thinly: packs in order, a loss summed over the whole step, checkpoints that appear whole."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer

from guardtrain.errors import CheckpointError
from guardtrain.model.load import quiet_progress_bars
from guardtrain.model.loss import chunkable_head, pack_loss_sum

log = logging.getLogger(__name__)

PARTIAL = "tmp-checkpoint"


class PackTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Trains on packs; everything else is the Trainer that people know."""

    def __init__(self, *args: Any, keep_checkpoints: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep_checkpoints = keep_checkpoints
        self.computed_tokens = 0  # on this rank, by this process: what throughput is measured with
        self._saving = False
        self._head = chunkable_head(self.accelerator.unwrap_model(self.model))
        # compute_loss divides by the weight of the whole step, so Trainer must not divide by the accumulation again.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The pack's weighted loss divided by the weight of all supervised tokens of the step, over all ranks."""
        self.computed_tokens += inputs["num_tokens"]
        step_weight = num_items_in_batch if num_items_in_batch is not None else inputs["weights"].sum()
        # Data-parallel engines average gradients over ranks; the loss is already divided by the global weight.
        loss: torch.Tensor = pack_loss_sum(model, inputs, self._head) / step_weight * self.accelerator.num_processes
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        weight = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(weight).sum() if self.args.world_size > 1 else weight

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log under the epoch of the rows: the Trainer takes the stream of all epochs for a single one."""
        self.state.epoch = self.train_dataset.epoch_after(self.state.global_step)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        root = Path(self.args.output_dir)
        return str(root / PARTIAL if self._saving else root)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write into a side folder and rename it when it is complete: a full disk leaves the older checkpoints intact."""
        name = f"checkpoint-{self.state.global_step}"
        root = Path(self.args.output_dir)
        self._saving = True
        try:
            with quiet_progress_bars():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(root / name, ignore_errors=True)
                (root / PARTIAL / name).rename(root / name)
        except (OSError, RuntimeError) as error:  # safetensors and torch.save wrap a full disk in errors of their own
            raise CheckpointError(
                "the checkpoint could not be written",
                where=f"step {self.state.global_step}",
                found=str(error).splitlines()[0],
                hint=f"older checkpoints in {root} are intact",
            ) from error
        finally:
            self._saving = False
            if self.args.should_save:
                shutil.rmtree(root / PARTIAL, ignore_errors=True)
        if self.args.should_save:
            for old in list_checkpoints(root)[: -self.keep_checkpoints]:
                shutil.rmtree(old)


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    found = [path for path in root.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
