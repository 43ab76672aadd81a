"""The end of a run: the model that was saved is let go of, loaded as its users will, and measured on the held-out rows."""

from __future__ import annotations

import dataclasses
import gc
import json
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from guardtrain.data.packing import layout
from guardtrain.data.template import GuardTemplate
from guardtrain.distributed.mirror import Mirror
from guardtrain.distributed.preemption import StopReason
from guardtrain.errors import TrainingError
from guardtrain.evaluate.calibration import calibrate_guard
from guardtrain.evaluate.report import evaluate_shown
from guardtrain.evaluate.runner import Evaluation
from guardtrain.inference.guards import LoadedGuard, load_guard
from guardtrain.model.loss import chunkable_head, pack_loss_sum
from guardtrain.train.folder import RunFolder
from guardtrain.train.job import Job
from guardtrain.train.memory import is_out_of_memory
from guardtrain.train.rows import build_tree, measured_rows
from guardtrain.train.trainer import PackTrainer


@dataclass(frozen=True)
class Outcome:
    """finished: False when the run was asked to stop early, stopped_by: by what.

    guard and evaluation (held-out rows): None for task instruct, and on every rank but the main one, which alone measures.
    """

    folder: RunFolder
    finished: bool
    summary: dict[str, Any]
    guard: LoadedGuard | None = None
    evaluation: Evaluation | None = None
    stopped_by: StopReason | None = None


@torch.no_grad()
def held_out_loss(job: Job) -> float | None:
    """Mean loss over the supervised tokens of held-out instruct rows; None for task guard, which has better measures."""
    if isinstance(job.template, GuardTemplate):
        return None
    job.model.eval()
    device, head = next(job.model.parameters()).device, chunkable_head(job.model)
    loss = weight = 0.0
    for row in job.rows.validation:
        pack = layout([build_tree(job.template, row, job.recipe.task.modes)])
        inputs = send_to_device(job.collator([pack]), device)
        weight += float(inputs["weights"].sum())
        with torch.autocast(device.type, job.precision.compute, enabled=job.precision.autocast):
            loss += float(pack_loss_sum(job.model, inputs, head))
    return loss / weight


def release(job: Job, trainer: PackTrainer) -> None:
    """Let go of weights, gradients and optimizer states, which are saved: the guard is loaded anew to be measured.

    The Trainer, its callbacks, accelerate and DeepSpeed's engine all hold on to the model, so its tensors are emptied.
    """
    engine = trainer.model_wrapped
    trainer.accelerator.free_memory()
    if hasattr(engine, "destroy"):
        engine.destroy()
    handler = trainer.callback_handler
    handler.model = handler.optimizer = handler.lr_scheduler = None
    trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    for parameter in job.model.parameters():
        parameter.grad, parameter.data = None, torch.empty(0, dtype=parameter.dtype)
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    unset_hf_deepspeed_config()  # what is loaded from here on is loaded whole


def finish(job: Job, summary: dict[str, Any], mirror: Mirror | None, console: Console) -> Outcome:
    """Measure what was saved, write the summary, and have the mirror complete. For the main rank alone. Raises TrainingError."""
    is_guard = isinstance(job.template, GuardTemplate)
    try:
        outcome = _measure(job, summary, console) if is_guard else Outcome(job.folder, True, summary)
        job.folder.summary.write_text(json.dumps(outcome.summary, indent=2) + "\n", encoding="utf-8")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        where, found = str(job.folder.model), str(error).splitlines()[0]
        hint = f"guardtrain evaluate {job.folder.root} ROWS on a machine with more memory"
        raise TrainingError("the guard is saved and could not be measured", where=where, found=found, hint=hint) from error
    finally:
        if mirror is not None:
            mirror.finish()
    return outcome


def _measure(job: Job, summary: dict[str, Any], console: Console) -> Outcome:
    """Load what was saved, measure it on the held-out rows, and write thresholds that were chosen there into guard.json."""
    guard = load_guard(str(job.folder.root))
    settings = job.recipe.evaluate
    held_out = measured_rows(job.rows, settings.max_rows, seed=job.recipe.data.seed)
    scorer = guard.scorer(settings.pack_tokens)
    evaluation = evaluate_shown("measure the guard", scorer, held_out, job.modes, console=console)
    calibrated = calibrate_guard(guard.settings, evaluation, settings.target_fpr, ["the run's held-out rows"])
    calibrated.write(job.folder.model)
    assert calibrated.calibration is not None
    evaluation = evaluation.calibrated(calibrated.calibration)
    measured = {"held_out": evaluation.to_json(), "thresholds": calibrated.thresholds}
    summary = {**summary, "collapsed": guard.settings.collapsed, **measured}
    return Outcome(job.folder, True, summary, dataclasses.replace(guard, settings=calibrated), evaluation)
