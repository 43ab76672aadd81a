"""A model's sizes from its `config.json`: parameters by kind, without loading or building anything.

Counted for decoder-only transformers with grouped-query attention and a gated MLP: Llama, Qwen3, Mistral, SmolLM and their kin.
Source: the modules of transformers' modeling_llama.py and modeling_qwen3.py; a test holds the counts against the built models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardtrain.errors import ConfigError
from guardtrain.json_files import read_object

MODELS = Path(__file__).parent / "models"
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Attention projections without a bias and no norms on queries and keys, unless the config or the architecture says otherwise.
QK_NORM = {"qwen3"}
QKV_BIAS = {"qwen2"}


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a model. Names as in config.json; `kind` is its model_type."""

    name: str
    kind: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    @property
    def query_width(self) -> int:
        """Width of all query heads together; not the hidden size in Qwen3."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.kind in QK_NORM

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one transformer layer, by name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, self.query_width),
            "k_proj": (hidden, self.kv_width),
            "v_proj": (hidden, self.kv_width),
            "o_proj": (self.query_width, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def linear_parameters_of_a_layer(self) -> int:
        """Weights of the seven matrices: what 4-bit quantisation stores in 4 bits."""
        return sum(inputs * outputs for inputs, outputs in self.linear_shapes.values())

    @property
    def vector_sizes(self) -> list[int]:
        """Lengths of a layer's norms, and of its biases where the architecture has them."""
        norms = [self.hidden_size] * 2 + ([self.head_dim] * 2 if self.has_qk_norm else [])
        biases = [self.query_width, self.kv_width, self.kv_width] if self.kind in QKV_BIAS else []
        return norms + biases

    @property
    def parameters_of_a_layer(self) -> int:
        """All of one transformer layer."""
        return self.linear_parameters_of_a_layer + sum(self.vector_sizes)

    @property
    def embedding_parameters(self) -> int:
        """The embedding; the output layer is as large, and the same where they are tied."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return (
            self.num_layers * self.parameters_of_a_layer + self.hidden_size + self.embedding_parameters * (1 if self.tied else 2)
        )

    @property
    def product_parameters(self) -> int:
        """Weights that every token is multiplied with: the matrices and the output layer."""
        return self.num_layers * self.linear_parameters_of_a_layer + self.embedding_parameters

    def lora_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Of adapters on `targets` in every layer; ("all-linear",) for the seven matrices."""
        names = tuple(self.linear_shapes) if targets == ("all-linear",) else targets
        return self.num_layers * sum(rank * sum(self.linear_shapes[name]) for name in names if name in self.linear_shapes)


def read_geometry(model: str) -> Geometry:
    """The geometry of a shipped model name, of a folder with a config.json, or of such a file. Raises ConfigError."""
    path = _find(model)
    return geometry_of(read_object(path, "a model's configuration"), name=model, where=str(path))


def geometry_of(tree: dict[str, Any], *, name: str, where: str) -> Geometry:
    """The geometry that a config.json describes; of a model with several parts, its text model. Raises ConfigError."""
    tree = tree.get("text_config", tree)
    problems = list(_problems(tree))
    if problems:
        raise ConfigError("the configuration lacks what a plan needs", where=where, found="; ".join(problems))
    heads = tree["num_attention_heads"]
    return Geometry(
        name=name,
        kind=str(tree.get("model_type", "llama")),
        hidden_size=tree["hidden_size"],
        intermediate_size=tree["intermediate_size"],
        num_layers=tree["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=tree.get("num_key_value_heads") or heads,
        head_dim=tree.get("head_dim") or tree["hidden_size"] // heads,
        vocab_size=tree["vocab_size"],
        tied=bool(tree.get("tie_word_embeddings", False)),
    )


def shipped_models() -> list[str]:
    """Names of the models whose geometry comes with the package."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


def _find(model: str) -> Path:
    path = Path(model).expanduser()
    if not path.exists() and (shipped := _shipped(model)) is not None:
        return shipped
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        expected = f"a folder with config.json, or one of {', '.join(shipped_models())}"
        raise ConfigError("no such model", where=model, expected=expected)
    return path


def _shipped(model: str) -> Path | None:
    """meta-llama/Llama-3.1-8B-Instruct has the geometry of llama-3.1-8b."""
    name = model.rpartition("/")[2].lower()
    return next((MODELS / f"{each}.json" for each in shipped_models() if re.search(rf"(^|-){re.escape(each)}(-|$)", name)), None)


def _problems(tree: dict[str, Any]) -> Iterator[str]:
    for key in NEEDED:
        value = tree.get(key)
        if not isinstance(value, int) or value < 1:
            yield f"{key} is {value!r}"
    heads, shared = tree.get("num_attention_heads"), tree.get("num_key_value_heads")
    if isinstance(heads, int) and shared is not None and (not isinstance(shared, int) or shared < 1 or heads % shared):
        yield f"num_key_value_heads is {shared!r}"
    if tree.get("num_local_experts") or tree.get("num_experts"):
        yield "a mixture of experts, which is not planned"
