"""What the forward keeps for the backward, and what both need at a time: bytes on one GPU, for one pack.

Derived from the operators of transformers' modeling_llama.py and modeling_qwen3.py, torch's autograd formulas (which operator
keeps which input), peft's adapters and this project's attention and loss, and held against tensor counts of real runs
(benchmarks/results/plan_cpu.json).

Width letters: D hidden size, F inner size of the MLP, H width of all query heads, K of all key heads, V vocabulary. T tokens of
a pack, S supervised ones. "c" is the bytes of a number in the computing format, "r" of one in the residual stream.
"""

from __future__ import annotations

from guardtrain.plan.geometry import Geometry
from guardtrain.plan.setup import CHUNK_ELEMENTS, CHUNK_TOKENS_OF_A_TRAINED_HEAD, Setup, block_tokens

FLOAT = 4


def kept_by_layer(geometry: Geometry, setup: Setup) -> float:
    """What one transformer layer keeps until its backward."""
    return setup.pack.tokens * (_norms(geometry, setup) + _projections(geometry, setup) + _mlp(geometry, setup)) + _attention(
        geometry, setup
    )


def kept_when_checkpointed(geometry: Geometry, setup: Setup) -> float:
    """What one layer keeps under gradient checkpointing: its input."""
    return setup.pack.tokens * geometry.hidden_size * residual_bytes(setup)


def kept_around_layers(geometry: Geometry, setup: Setup) -> float:
    """What final norm and rotary positions keep, and the hidden states that the output layer reads."""
    hidden = geometry.hidden_size
    final_norm = FLOAT + (residual_bytes(setup) if norms_train(setup) else 0)  # its input in float32, normalised for its weight
    positions = 2 * geometry.head_dim * setup.compute_bytes
    supervised = setup.pack.supervised_tokens * hidden * setup.compute_bytes
    return setup.pack.tokens * (hidden * final_norm + positions) + supervised


def layer_work(geometry: Geometry, setup: Setup) -> float:
    """What a layer's backward has in hand at most: the gradients of gate and up, the products' and the residual's."""
    width = 2 * setup.compute_bytes * geometry.intermediate_size + 2 * residual_bytes(setup) * geometry.hidden_size
    return setup.pack.tokens * width


def head_work(geometry: Geometry, setup: Setup) -> float:
    """What output layer and loss have in hand at most, beside what is kept: a chunk of logits, and gradients of the layer."""
    return max(_softmax_work(geometry, setup), _head_gradient_work(geometry, setup))


def head_trains(setup: Setup) -> bool:
    """Whether the output layer gets a gradient; method freeze leaves it as it is."""
    return setup.method == "full"


def norms_train(setup: Setup) -> bool:
    """Whether the layers' own norms get gradients."""
    return not setup.is_adapter


def residual_bytes(setup: Setup) -> int:
    """r: the residual stream has the format of the embedding."""
    return setup.weight_bytes


def chunk_tokens(geometry: Geometry, setup: Setup) -> int:
    """Supervised tokens whose logits are alive at a time."""
    fitting = max(1, CHUNK_ELEMENTS // geometry.vocab_size)
    chunk = max(fitting, CHUNK_TOKENS_OF_A_TRAINED_HEAD) if head_trains(setup) else fitting
    return min(chunk, setup.pack.supervised_tokens)


def _softmax_work(geometry: Geometry, setup: Setup) -> float:
    """Logits as the layer gives them, and in float32."""
    chunk = chunk_tokens(geometry, setup)
    return (setup.compute_bytes + FLOAT) * chunk * geometry.vocab_size + _summed_head_gradients(geometry, setup)


def _head_gradient_work(geometry: Geometry, setup: Setup) -> float:
    if not head_trains(setup):
        return 0.0
    product = setup.compute_bytes * geometry.embedding_parameters
    multiplied = setup.compute_bytes * chunk_tokens(geometry, setup) * geometry.vocab_size + product
    cast = product + setup.trained_bytes * geometry.embedding_parameters if setup.autocasts else 0
    return max(multiplied, cast) + _summed_head_gradients(geometry, setup)


def _summed_head_gradients(geometry: Geometry, setup: Setup) -> float:
    """The sum over chunks, where there are several."""
    is_summed = head_trains(setup) and setup.pack.supervised_tokens > chunk_tokens(geometry, setup)
    return float(geometry.embedding_parameters * setup.trained_bytes) if is_summed else 0.0


def _norms(geometry: Geometry, setup: Setup) -> float:
    """Bytes a token of the two norms of a layer: input in float32, normalised input for the weight, and 1/RMS."""
    hidden = geometry.hidden_size * (FLOAT + (residual_bytes(setup) if norms_train(setup) else 0))
    queries_and_keys = 0.0
    if geometry.has_qk_norm:
        width = geometry.query_width + geometry.kv_width
        queries_and_keys = width * (FLOAT + (setup.compute_bytes if norms_train(setup) else 0))
        queries_and_keys += FLOAT * (geometry.num_heads + geometry.num_kv_heads)
    return 2 * (hidden + FLOAT) + queries_and_keys


def _projections(geometry: Geometry, setup: Setup) -> float:
    """Bytes a token of what the linear layers keep: their inputs, where a weight or an adapter trains on them."""
    compute, kept = setup.compute_bytes, 0.0
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        readers = sum(_keeps_input(name, setup) for name in names)
        # Under autocast each reader casts the norm's output for itself.
        copies = readers if setup.autocasts else min(readers, 1)
        kept += compute * geometry.hidden_size * copies
    kept += compute * geometry.query_width * _keeps_input("o_proj", setup)
    kept += compute * geometry.intermediate_size * _keeps_input("down_proj", setup)
    if setup.is_adapter:
        kept += compute * setup.lora_rank * sum(has_adapter(name, setup) for name in geometry.linear_shapes)
    return kept


def _mlp(geometry: Geometry, setup: Setup) -> float:
    """Bytes a token of gate, up and activated gate."""
    return 3 * setup.compute_bytes * geometry.intermediate_size


def _attention(geometry: Geometry, setup: Setup) -> float:
    """Bytes of queries, keys, values, output and log-sum-exp, as the backend keeps them."""
    compute, tokens = setup.compute_bytes, setup.pack.tokens
    queries, keys = geometry.query_width, geometry.kv_width
    log_sums = FLOAT * tokens * geometry.num_heads
    if setup.attention == "flash":  # its output is what o_proj keeps
        return compute * tokens * (queries + 2 * keys) + log_sums
    if setup.attention == "flex":
        return compute * tokens * (2 * queries + 2 * keys) + log_sums
    return _sdpa(geometry, setup) + log_sums


def _sdpa(geometry: Geometry, setup: Setup) -> float:
    """Queries and outputs; keys and values for every query head, once whole and once for each block with the root before it; a
    mask for each block, as numbers."""
    compute, pack, queries = setup.compute_bytes, setup.pack, geometry.query_width
    block = block_tokens(pack)
    below = pack.tokens - pack.root_tokens
    seen = pack.root_tokens + block
    # In float32 residuals autocast casts the keys block by block, and the whole ones go.
    whole = 1 if setup.autocasts and not setup.is_adapter else 2
    return compute * (queries * (2 + whole) * pack.tokens + 2 * queries * below / block * seen + below * seen)


def _keeps_input(name: str, setup: Setup) -> bool:
    return not setup.is_adapter or has_adapter(name, setup)


def has_adapter(name: str, setup: Setup) -> bool:
    """Whether an adapter lies on the matrix of this name."""
    return "all-linear" in setup.lora_targets or name in setup.lora_targets
