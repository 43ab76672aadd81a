"""How a run trains, as far as memory and time depend on it: from a recipe, a strategy and a number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from guardtrain.config import Recipe
from guardtrain.distributed.engine import read_file

Method = Literal["full", "lora", "qlora", "freeze"]
Attention = Literal["sdpa", "flex", "flash"]
Compute = Literal["float32", "bfloat16", "float16"]

DEEPSPEED_FILES = Path(__file__).parents[2] / "ds_configs"
# guardtrain/model/loss.py: a chunk of float32 logits, and the least tokens of one where the output layer trains. A test holds
# them equal; importing them would load torch.
CHUNK_ELEMENTS = 2**25
CHUNK_TOKENS_OF_A_TRAINED_HEAD = 1024
# guardtrain/model/attention/sdpa.py
BLOCK_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class PackShape:
    """One pack. budget: train.pack_tokens; tokens: T, padding included; root_tokens: P, the policy that all its rows share;
    supervised_tokens: S; row_tokens: of one row."""

    budget: int
    tokens: int
    root_tokens: int
    supervised_tokens: int
    row_tokens: int

    @property
    def seen_tokens(self) -> float:
        """Tokens that an average token attends to: the root, half its own row, and half the root for the root's own."""
        below = self.tokens - self.root_tokens
        return (below * (self.root_tokens + self.row_tokens / 2) + self.root_tokens**2 / 2) / self.tokens


def block_tokens(pack: PackShape) -> float:
    """Tokens of rows that sdpa computes at a time: rows fill a block of BLOCK_TOKENS, the last reaches over its end."""
    return max(pack.row_tokens, BLOCK_TOKENS + pack.row_tokens / 2)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """DeepSpeed's part, from its file. Buckets in elements. hpz_ranks: GPUs that hold a second copy among them, 1 for none."""

    stage: int
    reduce_bucket: int
    allgather_bucket: int
    prefetch_bucket: int
    persistence_threshold: int
    reuse_distance: int
    sub_group: int
    overlaps: bool
    offload_optimizer: Literal["cpu", "nvme"] | None
    offload_weights: Literal["cpu", "nvme"] | None
    hpz_ranks: int


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run on `ranks` GPUs or processes. accumulation: packs of one step on each rank. engine: None without DeepSpeed."""

    method: Method
    pack: PackShape
    gradient_checkpointing: bool
    compute: Compute
    attention: Attention
    ranks: int = 1
    accumulation: int = 1
    engine: Engine | None = None
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = ("all-linear",)
    trained_layers: int = 8

    @property
    def compute_bytes(self) -> int:
        """Of a number in the computing format."""
        return 4 if self.compute == "float32" else 2

    @property
    def is_adapter(self) -> bool:
        """Whether the model's own weights stay as they are."""
        return self.method in {"lora", "qlora"}

    @property
    def weight_bytes(self) -> int:
        """Of a weight of the model in 16 or 32 bits: float32 where it trains without DeepSpeed, else the computing format."""
        return self.compute_bytes if self.is_adapter or self.engine is not None else 4

    @property
    def trained_bytes(self) -> int:
        """Of a weight that trains, and of its gradient as autograd leaves it."""
        return 4 if self.engine is None else self.compute_bytes

    @property
    def autocasts(self) -> bool:
        """Whether matrix products make copies of what trains in the computing format."""
        return self.trained_bytes > self.compute_bytes


def setup_of(recipe: Recipe, strategy: str, *, ranks: int, pack: PackShape, compute: Compute, attention: Attention) -> Setup:
    """`recipe` on `ranks` ranks under `strategy`, a name of launch/accelerate. Raises ConfigError for a broken DeepSpeed file."""
    model, train = recipe.model, recipe.train
    return Setup(
        method=model.method,
        pack=pack,
        gradient_checkpointing=train.gradient_checkpointing,
        compute=compute,
        attention=attention,
        ranks=ranks,
        accumulation=max(1, train.packs_per_step // ranks),
        engine=engine_of(strategy),
        lora_rank=model.lora_rank,
        lora_targets=model.lora_targets,
        trained_layers=model.trained_layers,
    )


def engine_of(strategy: str) -> Engine | None:
    """What the shipped DeepSpeed file of a strategy says; None for ddp and for one process. Raises ConfigError."""
    if not strategy.startswith("zero"):
        return None
    return read_engine(read_file(DEEPSPEED_FILES / f"{strategy}.json"))


def read_engine(tree: dict[str, Any]) -> Engine:
    """The part of a DeepSpeed file that memory and time depend on."""
    zero = tree["zero_optimization"]
    return Engine(
        stage=zero["stage"],
        reduce_bucket=zero["reduce_bucket_size"],
        allgather_bucket=zero.get("allgather_bucket_size", 0),
        prefetch_bucket=zero.get("stage3_prefetch_bucket_size", 0),
        persistence_threshold=zero.get("stage3_param_persistence_threshold", 0),
        reuse_distance=zero.get("stage3_max_reuse_distance", 0),
        sub_group=zero.get("sub_group_size", 0),
        overlaps=zero.get("overlap_comm", False),
        offload_optimizer=_device_of(zero, "offload_optimizer"),
        offload_weights=_device_of(zero, "offload_param"),
        hpz_ranks=zero.get("zero_hpz_partition_size", 1),
    )


def _device_of(zero: dict[str, Any], key: str) -> Any:
    device = zero.get(key, {}).get("device", "none")
    return None if device == "none" else device
