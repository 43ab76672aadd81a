"""The contenders of a step-time benchmark, each on transformers' Trainer or a subclass of it.

A step is one pass over all rows, however a contender cuts them into micro-batches, so losses and gradients of a step are
comparable exactly. The first step warms up and gives the gradient; what follows is timed.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from guardtrain.allocator import keep_freed_memory
from guardtrain.bench.work import IGNORED, Work
from guardtrain.config import Recipe
from guardtrain.data.collate import Collator
from guardtrain.data.packing import Pack, Segment, layout, plan_packs
from guardtrain.model.adapters import prepare_for_training
from guardtrain.model.attention import attention_windows, choose_backend
from guardtrain.model.load import load_model
from guardtrain.model.loss import loss_kernel
from guardtrain.train.trainer import PackTrainer

WHOLE_EPOCH = 1_000_000  # micro-batches of a step: more than any epoch has, so the Trainer steps at its end
MANY_STEPS = 1_000_000  # the clock ends a run


@dataclass
class Record:
    """What one contender did. seconds, losses: of each step; tokens: computed in all steps, padding included."""

    settings: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    peak_mib: int = 0


@dataclass(frozen=True)
class Task:
    """One contender's task.

    dtype: what products are computed in. steps, min_seconds: it trains until it has done as many steps and they have taken as
    long. batch_size, peer_pack_tokens: of peers that pad, and of those that pack; longer packs cost them attention over the
    whole pack. peer_attention, peer_liger: how peers compute attention, and whether Liger's kernels replace their layers.
    gradient_file: where the first step's gradient goes.
    """

    recipe: Recipe
    work: Work
    tokenizer: Any
    dtype: torch.dtype
    steps: int
    min_seconds: float
    batch_size: int
    peer_pack_tokens: int
    peer_attention: str
    peer_liger: bool
    gradient_file: Path
    output_dir: str


def run_contender(name: str, task: Task) -> Record:
    """Train and record."""
    trainer, settings = CONTENDERS[name](task)
    record = Record(settings)
    _listen(trainer, record, task)
    trainer.train()
    if torch.cuda.is_available():
        record.peak_mib = torch.cuda.max_memory_allocated() // 2**20
    else:
        record.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
    return record


def guardtrain(task: Task) -> tuple[Any, dict[str, Any]]:
    """This project: tree packing."""
    recipe, work = task.recipe, task.work
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keeps_memory = device == "cpu" and keep_freed_memory()
    backend, why = choose_backend(recipe.model.attention, device=device, dtype=task.dtype)
    model = _model(task, backend.registered_name)
    windows, budget = attention_windows(model.config), recipe.train.pack_tokens
    packs = FixedPacks(work, budget, recipe.train.seed)
    trainer = PackTrainer(
        model=model,
        args=TrainingArguments(**_arguments(task, batch_size=1)),
        train_dataset=packs,
        data_collator=Collator(lambda pack: backend.plan(pack, windows), budget if backend.needs_fixed_length else 1),
        keep_checkpoints=1,
    )
    settings = {"attention": f"{backend.name} ({why})", "pack_tokens": budget, "packs": len(packs)}
    return trainer, settings | {"keeps_freed_memory": keeps_memory, "loss": loss_kernel(trainer.model.get_output_embeddings())}


def plain_trainer(task: Task) -> tuple[Any, dict[str, Any]]:
    """transformers' Trainer, samples of like length padded together, logits of every position."""
    trainer = Trainer(
        model=_model(task, task.peer_attention),
        args=TrainingArguments(
            **_arguments(task, batch_size=task.batch_size),
            train_sampling_strategy="group_by_length",
            use_liger_kernel=task.peer_liger,
        ),
        train_dataset=_dataset(task),
        data_collator=DataCollatorForSeq2Seq(task.tokenizer, label_pad_token_id=IGNORED),
        processing_class=task.tokenizer,
    )
    return trainer, {"batch_size": task.batch_size, **_settings_of_peers(task)}


def trl_padded(task: Task) -> tuple[Any, dict[str, Any]]:
    """TRL's SFTTrainer, samples of like length padded together."""
    return _trl(task, {"batch_size": task.batch_size}, train_sampling_strategy="group_by_length")


def trl_packed(task: Task) -> tuple[Any, dict[str, Any]]:
    """TRL's SFTTrainer with its best-fit-decreasing packing, into longer sequences where the longest sample needs them."""
    length = max(task.peer_pack_tokens, *(len(sample["input_ids"]) for sample in task.work.samples()))
    return _trl(task, {"batch_size": 1, "max_length": length}, packing=True, packing_strategy="bfd")


def _trl(task: Task, settings: dict[str, Any], **changes: Any) -> tuple[Any, dict[str, Any]]:
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=_model(task, task.peer_attention),
        args=SFTConfig(
            **_arguments(task, batch_size=settings["batch_size"]),
            max_length=settings.get("max_length"),
            shuffle_dataset=False,
            use_liger_kernel=task.peer_liger,
            **changes,
        ),
        train_dataset=_dataset(task),
        processing_class=task.tokenizer,
    )
    return trainer, settings | _settings_of_peers(task)


def _settings_of_peers(task: Task) -> dict[str, Any]:
    return {"attention": task.peer_attention, "liger": task.peer_liger}


CONTENDERS: dict[str, Callable[[Task], tuple[Any, dict[str, Any]]]] = {
    "guardtrain": guardtrain,
    "trl-padded": trl_padded,
    "trl-packed": trl_packed,
    "trainer": plain_trainer,
}


class FixedPacks(Dataset[Pack]):
    """The same packs in every epoch."""

    def __init__(self, work: Work, budget: int, seed: int) -> None:
        self.work = work
        self.packs = plan_packs([len(row) for row in work.rows], budget - len(work.root_ids), seed=seed)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Pack:
        rows = [self.work.rows[row] for row in self.packs[index]]
        return layout([Segment.unsupervised(self.work.root_ids, rows)] if self.work.root_ids else rows)

    def epoch_after(self, steps: int) -> float:
        """One step is one epoch."""
        return float(steps)


def _model(task: Task, attention: str) -> Any:
    config = task.recipe.model
    is_adapter = config.method in {"lora", "qlora"}
    dtype = task.dtype if is_adapter else torch.float32
    model = load_model(config, dtype, quantized=config.method == "qlora", attention=attention)
    return prepare_for_training(model, config)


def _dataset(task: Task) -> Any:
    import datasets

    return datasets.Dataset.from_list(task.work.samples())


def _arguments(task: Task, *, batch_size: int) -> dict[str, Any]:
    """The same for all: AdamW at a constant rate, no clipping, nothing saved."""
    return {
        "output_dir": task.output_dir,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": WHOLE_EPOCH,
        "num_train_epochs": MANY_STEPS,
        "learning_rate": task.recipe.train.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": task.dtype is torch.bfloat16,
        "fp16": task.dtype is torch.float16,
        "gradient_checkpointing": task.recipe.train.gradient_checkpointing,
        "use_cpu": not torch.cuda.is_available(),
        "seed": task.recipe.train.seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def _listen(trainer: Any, record: Record, task: Task) -> None:
    """Take times at step boundaries, losses from what each micro-batch returns, and the first step's gradient."""
    inner = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        record.tokens += inputs["input_ids"].numel()
        loss = cast(torch.Tensor, inner(model, inputs, *args, **kwargs))
        record.losses[-1] += loss.item()
        return loss

    trainer.training_step = training_step
    trainer.add_callback(_Clock(record, task))


class _Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Step times, and when it is enough; the gradient is written while the clock stands."""

    def __init__(self, record: Record, task: Task) -> None:
        self.record, self.task, self.start = record, task, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock: what is collated, planned and copied before a step's first forward is the step's too."""
        self.start = _now()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new entry for the losses of the step's micro-batches."""
        self.record.losses.append(0.0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the first gradient."""
        if state.global_step == 0:
            stopped = _now()
            named = kwargs["model"].named_parameters()
            torch.save({name: p.grad.float().cpu() for name, p in named if p.grad is not None}, self.task.gradient_file)
            self.start += _now() - stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step's time."""
        seconds, now = self.record.seconds, _now()
        seconds.append(now - self.start)
        self.start = now
        control.should_training_stop = len(seconds) >= self.task.steps and sum(seconds) >= self.task.min_seconds


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
