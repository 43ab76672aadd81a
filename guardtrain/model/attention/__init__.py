"""Attention over a tree pack: three backends behind one interface, registered with transformers.

    sdpa    explicit masks, block by block          the CPU's default and the reference
    flex    FlexAttention under a block mask        the GPU's default
    flash   flash-attention in parts, merged        a GPU in float16 or bfloat16

A backend makes a plan of each pack, once, on the CPU; the plan travels as the argument `layout` of the model's call to every
layer. A call without one must bring its own 4-D mask (decoding does); with neither, attention would leak between rows, and it
is refused, as is everything else that a backend cannot do.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from guardtrain.errors import ConfigError, ModelError
from guardtrain.model.attention import flash, flex, sdpa

log = logging.getLogger(__name__)

BackendName = Literal["sdpa", "flex", "flash"]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over a tree.

    plan: `plan(tree, windows=())`, the tree of a pack and the sliding windows of the model's layers in tokens; what `attend`
        needs of them: nested dicts and lists of tensors and numbers.
    attend: `attend(query, key, value, plan, scaling=, dropout=, window=)`, attention of one layer. query, key, value:
        (1, H, T, D), key and value with fewer heads under GQA. Returns (1, H, T, D).
    has_window: whether it can honour a sliding window that is shorter than a row.
    needs_fixed_length: whether it compiles a kernel for each length, so that packs should be padded to a few lengths.
    """

    name: BackendName
    plan: Callable[..., dict[str, Any]]
    attend: Callable[..., torch.Tensor]
    has_window: bool = True
    needs_fixed_length: bool = False

    @property
    def registered_name(self) -> str:
        """What transformers calls it: a model's `attn_implementation`."""
        # 2026-11: transformers 5.23 takes every name with "flash" in it for a kernel that it should fetch.
        return f"guardtrain_{self.name}".replace("flash", "parts")


BACKENDS: dict[BackendName, Backend] = {
    "sdpa": Backend("sdpa", sdpa.plan, sdpa.attend),
    "flex": Backend("flex", flex.plan, flex.attend, needs_fixed_length=True),
    "flash": Backend("flash", flash.plan, flash.attend, has_window=False),
}


def choose_backend(name: Literal["auto"] | BackendName, *, device: str, dtype: torch.dtype) -> tuple[Backend, str]:
    """The backend of a recipe and why: `auto` takes flex where its kernels can be compiled, else sdpa.

    `flash` takes the newest kernels that are installed, for the whole process. device: "cuda" or "cpu". Raises ConfigError
    when the named backend cannot train there.
    """
    if name == "auto":
        if device == "cuda" and importlib.util.find_spec("triton") is not None:
            return BACKENDS["flex"], "chosen: triton, which compiles its kernels, is installed"
        return BACKENDS["sdpa"], "chosen: the others need a GPU" if device == "cpu" else "chosen: triton is not installed"
    if name != "sdpa" and device != "cuda":
        hint = "model.attention=auto takes what the machine can do"
        raise ConfigError("the backend has no backward without a GPU", where="model.attention", found=name, hint=hint)
    if name == "flash" and dtype not in {torch.float16, torch.bfloat16}:
        expected = "model.dtype bfloat16 or float16"
        raise ConfigError("flash-attention computes in half precision only", where="model.attention", expected=expected)
    why = "as the recipe says"
    return BACKENDS[name], f"{why}; {flash.use_newest_kernels()}" if name == "flash" else why


def attention_windows(config: Any) -> tuple[int, ...]:
    """The sliding windows of a model's layers, in tokens; empty for a model without any.

    Raises ModelError for layers that mix tokens in other ways (linear or chunked attention, convolutions): they know no tree, and
    rows would leak into each other there.
    """
    config = config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if unknown := sorted(set(kinds or ()) - {"full_attention", "sliding_attention"}):
        where, expected = str(getattr(config, "model_type", "model")), "full or sliding attention in every layer"
        raise ModelError("rows of a pack would leak into each other", where=where, expected=expected, found=", ".join(unknown))
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return ()
    return (window,)


def _attention_function(backend: Backend) -> Callable[..., tuple[torch.Tensor, None]]:
    """The function that transformers calls in every layer."""

    def tree_attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        layout: dict[str, Any] | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Returns (1, T, H, D) and no weights. Raises ModelError when it would leak or the model's attention is not covered."""
        if unknown := sorted(name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None):
            raise ModelError(
                "the model's attention is of a kind that is not covered", where=backend.registered_name, found=", ".join(unknown)
            )
        if layout is None:
            if attention_mask is None or attention_mask.ndim != 4:
                raise ModelError(
                    "attention without a pack layout or a 4-D mask would leak between rows", where=backend.registered_name
                )
            result: tuple[torch.Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return result
        if attention_mask is not None:
            raise ModelError("the model brings a mask of its own beside the pack's layout", where=backend.registered_name)
        output = backend.attend(query, key, value, layout, scaling=scaling, dropout=dropout, window=sliding_window)
        return output.transpose(1, 2).contiguous(), None

    return tree_attention


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout carries the masks; transformers need not build one."""
    return


for _backend in BACKENDS.values():
    AttentionInterface.register(_backend.registered_name, _attention_function(_backend))
    AttentionMaskInterface.register(_backend.registered_name, _no_mask)
