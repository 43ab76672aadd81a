"""One run from recipe to guard: check everything, train, measure on the held-out rows, leave a folder that can be used."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import set_seed

from guardtrain.allocator import keep_freed_memory
from guardtrain.config import Recipe
from guardtrain.data.template import GuardTemplate
from guardtrain.distributed.checkpoint import checkpoints
from guardtrain.distributed.mirror import Mirror
from guardtrain.distributed.preemption import StopReason, requests_of_the_job
from guardtrain.distributed.ranks import gather, join, launched, leave, wait_for_main
from guardtrain.distributed.whereabouts import Whereabouts, failed_collective
from guardtrain.errors import TrainingError
from guardtrain.inference.scorer import Scorer
from guardtrain.model.adapters import trainable_parameters
from guardtrain.secure.project import project_adapter
from guardtrain.train.callbacks import CollapseWatch, MetricsLog, ProgressBar, StopWhenAsked
from guardtrain.train.defences import summary_of
from guardtrain.train.finish import Outcome, finish, held_out_loss, release
from guardtrain.train.folder import RunFolder
from guardtrain.train.job import Job, build_job
from guardtrain.train.memory import advice, is_out_of_memory
from guardtrain.train.reference import HoldNearReference
from guardtrain.train.rows import watch_slice
from guardtrain.train.save import save_model, write_beside
from guardtrain.train.trainer import PackTrainer
from guardtrain.types import Label, Mode

# What a run that was told to stop waits for its last checkpoint to reach the second place.
MIRROR_SECONDS = 60.0

log = logging.getLogger(__name__)


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
    whereabouts = Whereabouts(job.recipe.distributed.timeout_seconds)
    try:
        return _train_and_save(job, whereabouts, console)
    except RuntimeError as error:
        explained = _out_of_memory(error, job, whereabouts) or failed_collective(error, whereabouts)
        if explained is None:
            raise
        raise explained from error
    finally:
        whereabouts.close()


def _train_and_save(job: Job, whereabouts: Whereabouts, console: Console) -> Outcome:
    trainer, watch, stop = _build_trainer(job, whereabouts, console)
    if job.checkpoint:
        log.info("resuming from %s", job.checkpoint)
    # DeepSpeed's engine has not placed the weights yet, and ZeRO-3 has split them already.
    loss_before = None if job.deepspeed is not None else held_out_loss(job)
    if not torch.cuda.is_available():
        keep_freed_memory()
    start = time.perf_counter()
    resumed = job.universal or job.checkpoint
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    summary = _training_summary(job, trainer, time.perf_counter() - start)
    if stop.reason is not None and trainer.state.global_step < job.stream.num_steps:
        return _stopped(job, trainer, stop.reason, summary)
    if watch and not watch.seen:  # resumed after the last step: the mark of the run must not get lost
        watch.look(trainer.state.global_step, is_main=job.ranks.is_main)
    if job.alignment is not None:
        whereabouts.at("projecting the adapter")
        projected = project_adapter(job.model, job.alignment, job.recipe.secure.project_threshold)
        summary["projected"] = summary_of(projected)
        log.info("%(projected)d of %(of)d updates were projected onto what alignment changed", summary["projected"])
    whereabouts.at("saving the model")
    save_model(job, trainer.accelerator.unwrap_model(trainer.model), watch.problem if watch else None, whereabouts.at)
    if (loss_after := held_out_loss(job)) is not None:
        summary["held_out_loss"] = {"before": loss_before, "after": loss_after}
    mirror = trainer.mirror
    release(job, trainer)
    whereabouts.close()  # from here on others wait for the main rank, for as long as it takes
    outcome = wait_for_main(lambda: finish(job, summary, mirror, console), "measured")
    return outcome or Outcome(job.folder, True, summary)


def _stopped(job: Job, trainer: PackTrainer, reason: StopReason, summary: dict[str, Any]) -> Outcome:
    log.warning("stopped at step %d of %d (%s); --resume continues", trainer.state.global_step, job.stream.num_steps, reason.text)
    if trainer.mirror is not None:
        trainer.mirror.finish(MIRROR_SECONDS)
    return Outcome(job.folder, finished=False, summary=summary, stopped_by=reason)


def _build_trainer(
    job: Job, whereabouts: Whereabouts, console: Console
) -> tuple[PackTrainer, CollapseWatch | None, StopWhenAsked]:
    trainer = PackTrainer(
        model=job.model,
        args=job.arguments,
        train_dataset=job.stream,
        data_collator=job.collator,
        processing_class=job.tokenizer,
        keep_checkpoints=job.recipe.output.keep_checkpoints,
        whereabouts=whereabouts,
        rows_of_pack=lambda pack: [job.rows.train[row].where for row in job.stream.packs[pack]],
        mirror=_mirror(job),
        universal=job.universal,
        rates=job.rates,
    )
    for default in list(trainer.callback_handler.callbacks):
        if type(default).__name__ in {"PrinterCallback", "ProgressCallback"}:
            trainer.remove_callback(default)
    stop = StopWhenAsked(requests_of_the_job(job.folder.root, job.recipe.distributed.stop_seconds_before_the_end))
    watch = _build_watch(job, trainer)
    # DeepSpeed's engine saves weights alone; with these any checkpoint can be exported.
    trainer.write_beside = lambda folder: write_beside(job, job.model, folder, watch.problem if watch else None)
    callbacks = [
        MetricsLog(job.folder.metrics, lambda: trainer.computed_tokens),
        ProgressBar(lambda: trainer.computed_tokens, console),
        stop,
        *([watch] if watch else []),
        *([HoldNearReference(job, trainer)] if job.recipe.secure.method == "first_tokens" else []),
    ]
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer, watch, stop


def _out_of_memory(error: RuntimeError, job: Job, whereabouts: Whereabouts) -> TrainingError | None:
    if not is_out_of_memory(error):
        return None
    trained, total = trainable_parameters(job.model)
    return TrainingError(
        "out of memory",
        where=f"rank {job.ranks.index}, {whereabouts.what}",
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
    """What all ranks did; figures of a resumed run are those since it resumed."""
    tokens = sum(gather(trainer.computed_tokens))
    return {
        "recipe": job.recipe.name,
        "steps": trainer.state.global_step,
        "training_rows": len(job.rows.train),
        "held_out_rows": len(job.rows.validation),
        "compute_dtype": job.precision.name,
        "train_seconds": round(seconds, 1),
        "computed_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        **({"peak_gpu_gib": gather(_peak_gpu_gib())} if torch.cuda.is_available() else {}),
        "final_loss": next((record["loss"] for record in reversed(trainer.state.log_history) if "loss" in record), None),
    }


def _peak_gpu_gib() -> float:
    """What tensors took at most on this rank's GPU; what the allocator and libraries hold comes on top."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)
