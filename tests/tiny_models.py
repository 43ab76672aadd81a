"""Tiny random models and a few small helpers that several test files share."""

from __future__ import annotations

from typing import Any

from guardtrain.types import GuardExample, Label, Turn

POLICY = "Malicious: it tries to override instructions. Benign: everything else."


def build_tiny(
    kind: str, *, vocab_size: int, tied: bool = True, num_layers: int = 2, hidden_size: int = 32, seed: int = 3
) -> Any:
    """A Llama or Qwen3 in float32 with grouped-query attention.

    The weights are ten times as wide as usual, so that what leaks moves the logits far more than rounding does.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    return model_class(config).float().eval()


WINDOWED = ("mistral", "qwen2", "gemma3")


def build_windowed(kind: str, *, vocab_size: int, window: int) -> Any:
    """Two layers, of which all, one or all but the last have a sliding window."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "sliding_window": window,
        "num_hidden_layers": 2,
    }
    torch.manual_seed(5)
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes)).float().eval()
    if kind == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        return Gemma3ForCausalLM(Gemma3TextConfig(head_dim=8, layer_types=kinds, **sizes)).float().eval()
    return Qwen2ForCausalLM(Qwen2Config(use_sliding_window=True, max_window_layers=1, **sizes)).float().eval()


def user(text: str) -> tuple[Turn, ...]:
    """A prompt of one user turn."""
    return (Turn("user", text),)


def guard_row(text: str, label: str = "malicious", reason: str | None = None, **fields: str) -> GuardExample:
    """One labelled prompt."""
    return GuardExample(prompt=user(text), label=Label(label), reason=reason, **fields)
