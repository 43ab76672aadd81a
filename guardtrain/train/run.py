"""One run from recipe to guard: check everything, train, measure on the held-out rows, leave a folder that can be used."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from guardtrain.config import Recipe
from guardtrain.data.packing import layout
from guardtrain.data.template import GuardTemplate
from guardtrain.distributed.checkpoint import checkpoints
from guardtrain.distributed.mirror import Mirror
from guardtrain.distributed.preemption import requests_of_the_job
from guardtrain.distributed.ranks import gather, join, launched, leave, together, wait_for_main
from guardtrain.distributed.weights import Weights, weights_to_save, write_model
from guardtrain.distributed.whereabouts import failed_collective
from guardtrain.errors import CheckpointError, TrainingError
from guardtrain.evaluate.report import evaluate_shown
from guardtrain.evaluate.runner import Evaluation, choose_thresholds
from guardtrain.inference.guards import Guard, GuardSettings, load_guard
from guardtrain.inference.scorer import Scorer
from guardtrain.model.adapters import trainable_parameters
from guardtrain.model.load import lasting_name, quiet_progress_bars
from guardtrain.model.loss import chunkable_head, pack_loss_sum
from guardtrain.train.callbacks import CollapseWatch, MetricsLog, ProgressBar, StopWhenAsked
from guardtrain.train.folder import RunFolder
from guardtrain.train.job import Job, build_job, trained_modes
from guardtrain.train.memory import advice, is_out_of_memory, keep_freed_memory
from guardtrain.train.rows import build_tree, measured_rows, watch_slice
from guardtrain.train.trainer import PackTrainer
from guardtrain.types import Label, Mode

# What a run that was told to stop waits for its last checkpoint to reach the second place.
MIRROR_SECONDS = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """finished: False when the run was asked to stop early, stopped_by: by what.

    guard and evaluation (held-out rows): None for task instruct, and on every rank but the main one, which alone measures.
    """

    folder: RunFolder
    finished: bool
    summary: dict[str, Any]
    guard: Guard | None = None
    evaluation: Evaluation | None = None
    stopped_by: str | None = None


def run(recipe: Recipe, *, resume: bool | Literal["auto"] = False, console: Console) -> Outcome:
    """Train `recipe` and measure it. Raises a GuardtrainError, with nothing written, when the run cannot work.

    resume: go on from the newest checkpoint; "auto": where there is one, else start anew in the place of what lies there.
    """
    if resume == "auto":
        join(timeout_seconds=recipe.distributed.timeout_seconds)
        resume = bool(gather(checkpoints(RunFolder(Path(recipe.run_dir)).checkpoints))[0])
        recipe = dataclasses.replace(recipe, output=dataclasses.replace(recipe.output, overwrite=True))
    set_seed(recipe.train.seed)
    logger = logging.getLogger("guardtrain")
    if not launched().is_main:
        logger.setLevel(logging.ERROR)
        console = Console(file=io.StringIO())  # one rank speaks for all
    job = build_job(recipe, resume=resume)
    if job.ranks.is_main:
        logger.setLevel(min(logger.level or logging.INFO, logging.INFO))
        with _logged(logger, job.folder.log_handler()):
            _say_plan(job)
            outcome = _train_and_measure(job, console=console)
    else:
        outcome = _train_and_measure(job, console=console)
    leave()
    return outcome


@contextlib.contextmanager
def _logged(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _say_plan(job: Job) -> None:
    trained, total = trainable_parameters(job.model)
    for note in [*job.rows.notes, *job.choices]:
        log.info("%s", note)
    log.info("method %s: %s of %s parameters train", job.recipe.model.method, f"{trained:,}", f"{total:,}")
    log.info(
        "%d training rows, %d held out; %d packs of %d tokens (%.0f %% full), %d steps",
        len(job.rows.train),
        len(job.rows.validation),
        len(job.stream),
        job.recipe.train.pack_tokens,
        100 * job.stream.fill(job.recipe.train.pack_tokens),
        job.stream.num_steps,
    )


def _train_and_measure(job: Job, *, console: Console) -> Outcome:
    trainer, watch, stop = _build_trainer(job, console)
    if job.checkpoint:
        log.info("resuming from %s", job.checkpoint)
    # DeepSpeed's engine has not placed the weights yet, and ZeRO-3 has split them already.
    loss_before = None if job.deepspeed is not None else _held_out_loss(job)
    if not torch.cuda.is_available():
        keep_freed_memory()
    start = time.perf_counter()
    try:
        resumed = job.universal or job.checkpoint
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except RuntimeError as error:
        raise _out_of_memory(error, job, trainer) or failed_collective(error, trainer.whereabouts) or error from error
    finally:
        trainer.whereabouts.close()
    summary = _training_summary(job, trainer, time.perf_counter() - start)
    if stop.reason is not None and trainer.state.global_step < job.stream.num_steps:
        step, steps = trainer.state.global_step, job.stream.num_steps
        log.warning("stopped at step %d of %d (%s); --resume continues", step, steps, stop.reason)
        if trainer.mirror is not None:
            trainer.mirror.finish(MIRROR_SECONDS)
        return Outcome(job.folder, finished=False, summary=summary, stopped_by=stop.reason)
    if watch and not watch.seen:  # resumed after the last step: the mark of the run must not get lost
        watch.look(trainer.state.global_step, is_main=job.ranks.is_main)
    collapsed = watch.problem if watch else None
    _save_model(job, trainer.accelerator.unwrap_model(trainer.model), collapsed)
    losses = {"before": loss_before, "after": _held_out_loss(job)}
    unset_hf_deepspeed_config()  # what is loaded from here on is loaded whole
    outcome = wait_for_main(lambda: _finished(job, summary, losses, console), "measured")
    if trainer.mirror is not None:
        trainer.mirror.finish()
    return outcome or Outcome(job.folder, True, summary)


def _finished(job: Job, summary: dict[str, Any], losses: dict[str, float | None], console: Console) -> Outcome:
    """Measure what was saved and write the summary."""
    if isinstance(job.template, GuardTemplate):
        outcome = _measure(job, summary, console)
    else:
        outcome = Outcome(job.folder, True, {**summary, "held_out_loss": losses})
    job.folder.summary.write_text(json.dumps(outcome.summary, indent=2) + "\n", encoding="utf-8")
    return outcome


def _build_trainer(job: Job, console: Console) -> tuple[PackTrainer, CollapseWatch | None, StopWhenAsked]:
    trainer = PackTrainer(
        model=job.model,
        args=job.arguments,
        train_dataset=job.stream,
        data_collator=job.collator,
        processing_class=job.tokenizer,
        keep_checkpoints=job.recipe.output.keep_checkpoints,
        rows_of_pack=lambda pack: [job.rows.train[row].where for row in job.stream.packs[pack]],
        mirror=_mirror(job),
        universal=job.universal,
    )
    for default in list(trainer.callback_handler.callbacks):
        if type(default).__name__ in {"PrinterCallback", "ProgressCallback"}:
            trainer.remove_callback(default)
    stop = StopWhenAsked(requests_of_the_job(job.folder.root, job.recipe.distributed.stop_seconds_before_the_end))
    watch = _build_watch(job, trainer)
    callbacks = [
        MetricsLog(job.folder.metrics, lambda: trainer.computed_tokens),
        ProgressBar(lambda: trainer.computed_tokens, console),
        stop,
        *([watch] if watch else []),
    ]
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer, watch, stop


def _out_of_memory(error: RuntimeError, job: Job, trainer: PackTrainer) -> TrainingError | None:
    if not is_out_of_memory(error):
        return None
    trained, total = trainable_parameters(job.model)
    return TrainingError(
        "out of memory",
        where=f"rank {job.ranks.index}, {trainer.whereabouts.what}",
        found=str(error).splitlines()[0],
        hint="; ".join(advice(job.recipe, trained, total, ranks=job.ranks.size, zero_stage=job.zero_stage)),
    )


def _mirror(job: Job) -> Mirror | None:
    target = job.recipe.output.mirror
    if target is None or not job.ranks.is_main:
        return None
    return Mirror(job.folder.root, Path(target.format(recipe=job.recipe.name)), job.recipe.output.keep_checkpoints)


def _build_watch(job: Job, trainer: PackTrainer) -> CollapseWatch | None:
    """The collapse watch over a balanced slice of the held-out rows; None for task instruct or when it is switched off."""
    template, train = job.template, job.recipe.train
    if not isinstance(template, GuardTemplate) or not train.watch_steps:
        return None
    watched = watch_slice(job.rows.validation, train.watch_rows, seed=train.seed)
    if not watched:
        log.warning("the held-out rows are of one class: no collapse watch")
        return None

    def scores() -> list[float]:
        """Scores of the watched rows in mode off, with the weights as they are now."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        scorer = Scorer(model, job.tokenizer, template, pack_tokens=job.recipe.evaluate.pack_tokens)
        with torch.autocast(model.device.type, job.precision.compute, enabled=job.precision.autocast):
            by_index = dict(scorer.score([example.prompt for example in watched], [Mode.OFF]))
        model.train()
        return [by_index[index].scores[Mode.OFF] for index in range(len(watched))]

    is_malicious = [example.label is Label.MALICIOUS for example in watched]
    return CollapseWatch(scores, is_malicious, train.watch_steps, job.folder.metrics)


def _training_summary(job: Job, trainer: PackTrainer, seconds: float) -> dict[str, Any]:
    """What this process did; figures of a resumed run are those since it resumed."""
    return {
        "recipe": job.recipe.name,
        "steps": trainer.state.global_step,
        "training_rows": len(job.rows.train),
        "held_out_rows": len(job.rows.validation),
        "compute_dtype": job.precision.name,
        "train_seconds": round(seconds, 1),
        "computed_tokens": trainer.computed_tokens,
        "tokens_per_second": round(trainer.computed_tokens / seconds, 1),
        "final_loss": next((record["loss"] for record in reversed(trainer.state.log_history) if "loss" in record), None),
    }


def _save_model(job: Job, model: Any, collapsed: str | None) -> None:
    """Write `model/` whole or not at all: weights or adapter, tokenizer, guard.json."""
    weights = weights_to_save(model, job.zero_stage)
    together(lambda: _write_model(job, model, weights, collapsed) if job.ranks.is_main else None)


def _write_model(job: Job, model: Any, weights: Weights | None, collapsed: str | None) -> None:
    partial = job.folder.root / "tmp-model"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet_progress_bars():
            write_model(model, partial, weights)
        job.tokenizer.save_pretrained(partial)
        if isinstance(job.template, GuardTemplate):
            _settings(job, collapsed).write(partial)
        shutil.rmtree(job.folder.model, ignore_errors=True)
        partial.rename(job.folder.model)
    except (OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        hint = f"the last checkpoint in {job.folder.checkpoints} is intact; make room and --resume"
        raise CheckpointError("the model could not be written", where=str(job.folder.model), found=first, hint=hint) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settings(job: Job, collapsed: str | None) -> GuardSettings:
    task = job.recipe.task
    return GuardSettings(
        base_model=lasting_name(job.recipe.model.name),
        revision=job.recipe.model.revision,
        method=job.recipe.model.method,
        policy=task.policy,
        modes=trained_modes(job.recipe, job.rows.train),
        max_reason_tokens=task.max_reason_tokens,
        max_prompt_tokens=job.recipe.data.max_prompt_tokens,
        target_fpr=job.recipe.evaluate.target_fpr,
        collapsed=collapsed,
    )


@torch.inference_mode()
def _held_out_loss(job: Job) -> float | None:
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
        loss += float(pack_loss_sum(job.model, inputs, head))
    return loss / weight


def _measure(job: Job, summary: dict[str, Any], console: Console) -> Outcome:
    """Load what was saved, measure it on the held-out rows, and write thresholds that were chosen there into guard.json."""
    guard = load_guard(str(job.folder.root))
    settings = job.recipe.evaluate
    held_out = measured_rows(job.rows, settings.max_rows, seed=job.recipe.data.seed)
    scorer = guard.scorer(settings.pack_tokens)
    evaluation = evaluate_shown("measure the guard", scorer, held_out, job.modes, console=console)
    thresholds = choose_thresholds(evaluation, settings.target_fpr)
    evaluation = evaluation.at(thresholds)
    dataclasses.replace(guard.settings, thresholds=thresholds).write(job.folder.model)
    summary = {**summary, "collapsed": guard.settings.collapsed, "held_out": evaluation.to_json(), "thresholds": thresholds}
    return Outcome(job.folder, True, summary, guard, evaluation)
