"""One run from recipe to guard: check everything, train, measure on the held-out rows, leave a folder that can be used."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from transformers import TrainingArguments, set_seed

from guardtrain.config import Recipe
from guardtrain.data.collate import Collator
from guardtrain.data.packing import layout
from guardtrain.data.template import GuardTemplate
from guardtrain.errors import CheckpointError, ConfigError
from guardtrain.evaluate.report import evaluate_shown
from guardtrain.evaluate.runner import Evaluation, EvaluationMode, choose_thresholds
from guardtrain.inference.guards import Guard, GuardSettings, load_guard
from guardtrain.inference.scorer import Scorer
from guardtrain.model.adapters import prepare_for_training, trainable_parameters
from guardtrain.model.attention import Backend, attention_windows, choose_backend
from guardtrain.model.load import lasting_name, load_model, load_tokenizer, quiet_progress_bars
from guardtrain.model.loss import chunkable_head, pack_loss_sum
from guardtrain.model.precision import Precision, choose_precision
from guardtrain.train.callbacks import CollapseWatch, MetricsLog, ProgressBar, StopOnInterrupt
from guardtrain.train.folder import RunFolder, RunState
from guardtrain.train.memory import keep_freed_memory
from guardtrain.train.rows import Rows, Template, build_stream, build_template, build_tree, load_rows, measured_rows, watch_slice
from guardtrain.train.stream import PackStream
from guardtrain.train.trainer import PackTrainer
from guardtrain.types import Example, GuardExample, Label, Mode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, built and checked before the first step."""

    recipe: Recipe
    folder: RunFolder
    tokenizer: Any
    template: Template
    rows: Rows
    stream: PackStream
    precision: Precision
    choices: list[str]  # what was chosen for this machine and why, for people
    collator: Collator
    model: Any
    modes: list[EvaluationMode]


@dataclass(frozen=True)
class Outcome:
    """finished: False when Ctrl-C ended the run early. guard and evaluation (held-out rows): None for task instruct."""

    folder: RunFolder
    finished: bool
    summary: dict[str, Any]
    guard: Guard | None = None
    evaluation: Evaluation | None = None


def run(recipe: Recipe, *, resume: bool = False, console: Console) -> Outcome:
    """Train `recipe` and measure it. Raises a GuardtrainError, with nothing written, when the run cannot work."""
    set_seed(recipe.train.seed)
    job = build_job(recipe, resume=resume)
    handler = job.folder.log_handler()
    logger = logging.getLogger("guardtrain")
    logger.setLevel(min(logger.level or logging.INFO, logging.INFO) if _is_main() else logging.ERROR)
    logger.addHandler(handler)
    try:
        _say_plan(job)
        return _train_and_measure(job, resume=resume, console=console)
    finally:
        logger.removeHandler(handler)
        handler.close()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def build_job(recipe: Recipe, *, resume: bool = False) -> Job:
    """Check and load everything; the run folder is touched last."""
    _check_trackers(recipe)
    _check_one_process()
    if not torch.cuda.is_available():
        # 2026-11: DeepSpeed, which accelerate imports on the way, else warns on standard output that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    folder = RunFolder(Path(recipe.run_dir))
    folder.check(recipe, resume=resume)
    # A machine under load could measure another dtype now than when the run began.
    precision = choose_precision(folder.state.dtype if resume else recipe.model.dtype)
    backend, why_backend = choose_backend(recipe.model.attention, device=_device(), dtype=precision.compute)
    tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
    template = build_template(tokenizer, recipe.task)
    rows = load_rows(recipe, template)
    stream = build_stream(recipe, template, rows, world_size=1)
    modes = evaluation_modes(recipe, rows.train) if recipe.task.kind == "guard" else []
    state = RunState(dtype=precision.name, data=stream.fingerprint())
    if resume:
        folder.check_state(state)
    model = _build_model(recipe, precision, backend)
    _check_context(recipe, template, model, backend)
    folder.start(recipe, state, resume=resume)
    rows.write_rejects()
    said = [f"computing in {precision.name}: {precision.why}", f"tree attention by {backend.name}: {why_backend}"]
    return Job(
        recipe, folder, tokenizer, template, rows, stream, precision, said, _collator(recipe, backend, model), model, modes
    )


def _check_one_process() -> None:
    """Ranks would overwrite each other's run folder: several of them are not supported yet."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        raise ConfigError("training on several ranks is not supported yet", where="WORLD_SIZE", expected="1", found=ranks)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _collator(recipe: Recipe, backend: Backend, model: Any) -> Collator:
    windows = attention_windows(model.config)
    return Collator(
        lambda pack: backend.plan(pack, windows), pad_to=recipe.train.pack_tokens if backend.needs_fixed_length else 1
    )


def _build_model(recipe: Recipe, precision: Precision, backend: Backend) -> Any:
    """Below an adapter the weights are kept in the computing dtype; full and freeze hold all of them in float32."""
    is_adapter = recipe.model.method in {"lora", "qlora"}
    weights_dtype = precision.compute if is_adapter else torch.float32
    model = load_model(recipe.model, weights_dtype, quantized=recipe.model.method == "qlora", attention=backend.registered_name)
    return prepare_for_training(model, recipe.model)


def _check_context(recipe: Recipe, template: Template, model: Any, backend: Backend) -> None:
    """The longest row that the recipe admits must fit the positions that the model was made for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    needed = recipe.data.max_prompt_tokens
    if isinstance(template, GuardTemplate):
        needed += len(template.policy_ids) + recipe.task.max_reason_tokens
    if limit is not None and needed > limit:
        found = f"{needed} with policy and reason" if isinstance(template, GuardTemplate) else str(needed)
        raise ConfigError(
            "longer rows than the model has positions", where="data.max_prompt_tokens", expected=f"at most {limit}", found=found
        )
    windows = attention_windows(model.config)
    if not backend.has_window and any(needed > window for window in windows):
        raise ConfigError(
            f"backend {backend.name} has no sliding window",
            where="data.max_prompt_tokens",
            expected=f"rows of at most {min(windows)} tokens",
            found=str(needed),
            hint="model.attention=auto",
        )


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


def _train_and_measure(job: Job, *, resume: bool, console: Console) -> Outcome:
    trainer, watch, interrupt = _build_trainer(job, console)
    checkpoint = job.folder.newest_checkpoint if resume else None
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    loss_before = _held_out_loss(job)
    if not torch.cuda.is_available():
        keep_freed_memory()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    summary = _training_summary(job, trainer, time.perf_counter() - start)
    if watch and not watch.seen:  # resumed after the last step: the mark of the run must not get lost
        watch.look(trainer.state.global_step)
    if interrupt.interrupted and trainer.state.global_step < job.stream.num_steps:
        log.warning("stopped at step %d of %d; --resume continues", trainer.state.global_step, job.stream.num_steps)
        return Outcome(job.folder, finished=False, summary=summary)
    collapsed = watch.problem if watch else None
    _save_model(job, trainer.accelerator.unwrap_model(trainer.model), collapsed)
    if isinstance(job.template, GuardTemplate):
        outcome = _measure(job, summary, console)
    else:
        losses = {"before": loss_before, "after": _held_out_loss(job)}
        outcome = Outcome(job.folder, True, {**summary, "held_out_loss": losses})
    job.folder.summary.write_text(json.dumps(outcome.summary, indent=2) + "\n", encoding="utf-8")
    return outcome


def _build_trainer(job: Job, console: Console) -> tuple[PackTrainer, CollapseWatch | None, StopOnInterrupt]:
    trainer = PackTrainer(
        model=job.model,
        args=training_arguments(job),
        train_dataset=job.stream,
        data_collator=job.collator,
        processing_class=job.tokenizer,
        keep_checkpoints=job.recipe.output.keep_checkpoints,
    )
    for default in list(trainer.callback_handler.callbacks):
        if type(default).__name__ in {"PrinterCallback", "ProgressCallback"}:
            trainer.remove_callback(default)
    interrupt = StopOnInterrupt()
    watch = _build_watch(job, trainer)
    callbacks = [
        MetricsLog(job.folder.metrics, lambda: trainer.computed_tokens),
        ProgressBar(lambda: trainer.computed_tokens, console),
        interrupt,
        *([watch] if watch else []),
    ]
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer, watch, interrupt


def training_arguments(job: Job) -> TrainingArguments:
    """The recipe in transformers' words."""
    train = job.recipe.train
    arguments = TrainingArguments(
        output_dir=str(job.folder.checkpoints),
        per_device_train_batch_size=1,  # one pack
        gradient_accumulation_steps=train.packs_per_step,
        max_steps=job.stream.num_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(train.warmup_ratio * job.stream.num_steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        # 2026-11: transformers 5.23 warns of this name even when it is off, and 5.17 does not know the new one.
        **({"gradient_checkpointing": True} if train.gradient_checkpointing else {}),
        bf16=job.precision.compute is torch.bfloat16,
        fp16=job.precision.compute is torch.float16,
        use_cpu=not torch.cuda.is_available(),
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=train.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show the mean of other steps for a loss that is not a number
        save_strategy="steps",
        save_steps=train.save_steps,
        report_to=list(train.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # else the Trainer wraps the model in DataParallel, which cannot split a pack
    return arguments


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
    partial = job.folder.root / "tmp-model"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet_progress_bars():
            model.save_pretrained(partial)
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


def trained_modes(recipe: Recipe, train: Sequence[Example]) -> tuple[str, ...]:
    """The recipe's modes that some row trains: without a reason none trains mode on."""
    has_reason = any(isinstance(row, GuardExample) and row.reason is not None for row in train)
    return tuple(mode for mode in recipe.task.modes if mode == "off" or has_reason)


def evaluation_modes(recipe: Recipe, train: Sequence[Example]) -> list[EvaluationMode]:
    """The recipe's evaluation modes, less those that are not trained. Raises ConfigError when none is left."""
    trained = set(trained_modes(recipe, train))
    modes = [mode for mode in recipe.evaluate.modes if (trained == {"off", "on"} if mode == "both" else mode in trained)]
    if not modes:
        found = f"{list(recipe.evaluate.modes)}, trained {sorted(trained)}"
        raise ConfigError("no mode is both trained and measured", where="evaluate.modes", expected="a trained mode", found=found)
    return modes


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


def _check_trackers(recipe: Recipe) -> None:
    for tracker in recipe.train.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError("not installed", where="train.report_to", found=tracker, hint=f"pip install {tracker}")
