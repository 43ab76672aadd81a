"""Every backend against plain attention under a naive mask, over random trees."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flash_reference import ReferenceKernel
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import naive_mask, shared_root, trees

from guardtrain.data.packing import Segment, layout, padded
from guardtrain.errors import ConfigError, ModelError
from guardtrain.model.attention import BACKENDS, attention_windows, choose_backend, flash, flex, sdpa
from guardtrain.model.attention.tree import subtree_ends, visible

QUERY_HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8
SCALE = 0.3
any_roots = trees | shared_root
windows = st.sampled_from([0, 1, 2, 3, 5, 100])


# --- the tree


@given(roots=any_roots, window=windows)
def test_two_comparisons_equal_a_walk_up_the_tree(roots: list[Segment], window: int) -> None:
    pack = layout(roots)
    everything = np.arange(len(pack))
    assert visible(pack, everything, everything, window).tolist() == naive_mask(roots, window)


def test_subtree_ends_by_hand() -> None:
    leaf = Segment.unsupervised([7])
    pack = layout([Segment.unsupervised([1, 2], [Segment.unsupervised([3], [leaf, leaf]), leaf]), leaf])
    assert pack.segment_ids_T.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert subtree_ends(pack).tolist() == [6, 6, 5, 4, 5, 6, 7]


# --- plans


@given(roots=any_roots, block_tokens=st.integers(1, 40), window=windows)
def test_sdpa_blocks_are_the_mask_cut_into_whole_rows(roots: list[Segment], block_tokens: int, window: int) -> None:
    pack = layout(roots)
    plan = sdpa.plan(pack, (window,) if window else (), block_tokens=block_tokens)
    root, sizes = plan["root_tokens"], plan["block_tokens"]
    is_windowed = window in plan["masks"] and window > 0
    masks = plan["masks"][window if is_windowed else 0]
    rebuilt_TT = np.zeros((len(pack), len(pack)), dtype=bool)
    rebuilt_TT[:root, :root] = masks[0] if is_windowed and root else np.tri(root, dtype=bool)
    start = root
    for size, mask in zip(sizes, masks[1:] if is_windowed else masks, strict=True):
        whole = np.tri(size, dtype=bool) if mask is None else mask.numpy()
        assert whole.shape == (size, root + size)
        rebuilt_TT[start : start + size, :root] = whole[:, :root]
        rebuilt_TT[start : start + size, start : start + size] = whole[:, root:]
        start += size
    assert start == len(pack)
    assert rebuilt_TT.tolist() == naive_mask(roots, window)
    rows = [child for child in roots[0].children if len(child)] if len(roots) == 1 else []
    assert root == (len(roots[0].input_ids) if rows else 0)
    rows = rows or roots
    assert all(size >= block_tokens for size in sizes[:-1])
    assert all(size < block_tokens + max(map(len, rows)) for size in sizes)  # closed as soon as it is large enough


@given(roots=any_roots, block=st.sampled_from([2, 3, 8]), window=windows)
def test_flex_blocks_are_full_or_mixed_where_the_mask_says_so(roots: list[Segment], block: int, window: int) -> None:
    pack, mask_TT = layout(roots), np.array(naive_mask(roots, window))
    mixed_QK, full_QK = flex.classify_blocks(pack.position_ids_T, subtree_ends(pack), window, block)
    assert not (mixed_QK & full_QK).any()
    for q in range(len(mixed_QK)):
        for k in range(len(mixed_QK)):
            part = mask_TT[q * block : (q + 1) * block, k * block : (k + 1) * block]
            if full_QK[q, k]:
                assert part.all()
                assert part.shape == (block, block)
            elif not mixed_QK[q, k]:
                assert not part.any()


def test_most_of_a_guard_pack_is_empty_blocks() -> None:
    """What flex and flash are for: rows do not look at each other."""
    row = Segment.unsupervised([1] * 128)
    pack = layout([Segment.unsupervised([1] * 256, [row] * 30)])
    mixed_QK, full_QK = flex.classify_blocks(pack.position_ids_T, subtree_ends(pack), 0)
    assert full_QK.sum() == 1 + 2 * 30
    assert mixed_QK.sum() == 2 + 30


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        (9, {"flash_attn_interface", "flash_attn.cute"}, "FA3"),
        (9, {"flash_attn.cute"}, "FA4"),
        (10, {"flash_attn_interface", "flash_attn.cute"}, "FA4"),
        (10, {"flash_attn_interface"}, None),
        (8, {"flash_attn_interface", "flash_attn.cute"}, None),
        (9, set(), None),
    ],
)
def test_flash_takes_the_newest_kernels_of_the_gpu(capability: int, installed: set[str], expected: str | None) -> None:
    assert flash.newest_kernels(capability, installed.__contains__) == expected


@pytest.mark.parametrize("name", flash.MODULES)
def test_flash_keeps_torchs_kernels_and_says_why_newer_ones_do_not_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is not there, whatever `newest_kernels` was told: torch itself refuses."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10 if name == "FA4" else 9, 0))
    assert flash.use_newest_kernels() == "torch's own kernels"
    monkeypatch.setattr(flash, "_is_installed", flash.MODULES[name].__eq__)
    assert flash.use_newest_kernels().startswith(f"torch's own kernels, {name} does not load: No module named 'flash_attn")


# --- attention


def random_heads(tokens: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, heads, tokens, HEAD_DIM, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    ]


def naive_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: list[list[bool]]) -> torch.Tensor:
    groups = QUERY_HEADS // KEY_HEADS
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~torch.tensor(mask), float("-inf"))
    return scores.softmax(-1) @ value


def output_and_gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


flash_in_float64 = functools.partial(flash.attend, kernel=ReferenceKernel())


def test_flash_gives_its_kernel_one_format_under_autocast() -> None:
    """Rotary and norms leave queries and keys in float32 beside values in bfloat16; the kernels take no such mixture."""

    class Watching(ReferenceKernel):
        formats: ClassVar[list[torch.dtype]] = []

        def forward(self, *tensors: Any) -> Any:
            self.formats += [tensor.dtype for tensor in tensors[:3]]
            return super().forward(*tensors)

    pack = layout([Segment.unsupervised([1] * 5, [Segment.unsupervised([1] * 3)] * 2)])
    query, key, value = (tensor.detach().float() for tensor in random_heads(len(pack), 0))
    with torch.autocast("cpu", torch.bfloat16):
        found = flash.attend(
            query, key, value.bfloat16(), flash.plan(pack), scaling=SCALE, dropout=0.0, window=None, kernel=Watching()
        )
    assert set(Watching.formats) == {torch.bfloat16} == {found.dtype}


@settings(max_examples=60)
@given(roots=any_roots, window=windows, seed=st.integers(0, 99))
def test_sdpa_equals_attention_under_the_naive_mask(roots: list[Segment], window: int, seed: int) -> None:
    pack = layout(roots)
    inputs = random_heads(len(pack), seed)
    plan = sdpa.plan(pack, (window,) if window else (), block_tokens=4)
    found = sdpa.attend(*inputs, plan, scaling=SCALE, dropout=0.0, window=window or None)
    assert_same(found, naive_attention(*inputs, naive_mask(roots, window)), inputs)


@settings(max_examples=60)
@given(roots=any_roots, seed=st.integers(0, 99))
def test_flash_in_parts_equals_attention_under_the_naive_mask(roots: list[Segment], seed: int) -> None:
    """The calls, the merge and its backward, over a kernel that is written to be read."""
    pack = layout(roots)
    inputs = random_heads(len(pack), seed)
    found = flash_in_float64(*inputs, flash.plan(pack), scaling=SCALE, dropout=0.0, window=None)
    assert_same(found, naive_attention(*inputs, naive_mask(roots)), inputs)


def assert_same(found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    pairs = zip(output_and_gradients(found, inputs), output_and_gradients(expected, inputs), strict=True)
    for value, wanted in pairs:
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(roots=any_roots, window=windows, pad=st.integers(0, 200))
def test_flex_equals_attention_under_the_naive_mask(roots: list[Segment], window: int, pad: int) -> None:
    """Forward only: FlexAttention has no backward on a CPU."""
    tokens = len(layout(roots))
    pack = padded(layout(roots), pad)
    inputs = [tensor.detach().float() for tensor in random_heads(len(pack), 1)]
    plan = flex.plan(pack, (window,) if window else ())
    with torch.no_grad():
        found = flex.attend(*inputs, plan, scaling=SCALE, dropout=0.0, window=window or None)
    expected = naive_attention(*(tensor[:, :, :tokens] for tensor in inputs), naive_mask(roots, window))
    torch.testing.assert_close(found[:, :, :tokens], expected, rtol=1e-4, atol=1e-5)


def test_a_guard_pack_takes_three_calls_of_flash() -> None:
    completions = [Segment.unsupervised([1] * 3), Segment.unsupervised([1] * 5)]
    pack = layout([Segment.unsupervised([1] * 9, [Segment.unsupervised([1] * 4, completions)] * 6)])
    calls = flash.plan(pack)["calls"]
    assert [(call["is_causal"], len(call["cu_queries"]) - 1) for call in calls] == [(True, 19), (False, 1), (False, 6)]
    assert [(call["max_queries"], call["max_keys"]) for call in calls[1:]] == [(72, 9), (8, 4)]


# --- what is refused


@pytest.mark.parametrize("attend", [flex.attend, flash_in_float64])
def test_dropout_is_refused_where_there_is_none(attend: Any) -> None:
    with pytest.raises(ModelError, match="no dropout"):
        attend(*random_heads(3, 0), {}, scaling=None, dropout=0.1, window=None)


def test_flash_refuses_a_window_shorter_than_a_row() -> None:
    plan = flash.plan(layout([Segment.unsupervised([1] * 9)]))
    with pytest.raises(ModelError, match="longer than the model's sliding window"):
        flash_in_float64(*random_heads(9, 0), plan, scaling=None, dropout=0.0, window=8)
    flash_in_float64(*random_heads(9, 0), plan, scaling=None, dropout=0.0, window=9)


def test_the_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = functools.partial(choose_backend, dtype=torch.bfloat16)
    assert choose("auto", device="cpu") == (BACKENDS["sdpa"], "chosen: the others need a GPU")
    assert choose("sdpa", device="cpu") == (BACKENDS["sdpa"], "as the recipe says")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose("auto", device="cuda") == (BACKENDS["sdpa"], "chosen: triton is not installed")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert choose("auto", device="cuda")[0] is BACKENDS["flex"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert choose("flash", device="cuda") == (BACKENDS["flash"], "as the recipe says; torch's own kernels")


@pytest.mark.parametrize("name", ["flex", "flash"])
def test_a_backend_without_a_backward_is_refused_on_a_cpu(name: Any) -> None:
    with pytest.raises(ConfigError, match=f"model.attention: the backend has no backward without a GPU, found {name}"):
        choose_backend(name, device="cpu", dtype=torch.bfloat16)


def test_flash_in_float32_is_refused() -> None:
    with pytest.raises(ConfigError, match="in half precision only"):
        choose_backend("flash", device="cuda", dtype=torch.float32)


def test_the_windows_of_a_model() -> None:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    assert attention_windows(LlamaConfig()) == ()
    assert attention_windows(MistralConfig(sliding_window=64)) == (64,)
    assert attention_windows(MistralConfig(sliding_window=None)) == ()
    assert attention_windows(Qwen2Config(sliding_window=64, use_sliding_window=False)) == ()
    mixed = Qwen2Config(num_hidden_layers=2, sliding_window=64, use_sliding_window=True, max_window_layers=1)
    assert attention_windows(mixed) == (64,)


def test_torchs_kernels_take_our_calls() -> None:
    """On the meta device: names, order and shapes of the arguments, no numbers."""
    pack = layout([Segment.unsupervised([1] * 9, [Segment.unsupervised([1] * 4)] * 6)])
    calls = flash.plan(pack)["calls"]
    for call in calls:
        queries, keys = (int(call[name][-1]) for name in ("cu_queries", "cu_keys"))
        call |= {name: call[name].to("meta") for name in ("cu_queries", "cu_keys")}
        query = torch.empty(queries, QUERY_HEADS, HEAD_DIM, device="meta", dtype=torch.bfloat16)
        key = torch.empty(keys, KEY_HEADS, HEAD_DIM, device="meta", dtype=torch.bfloat16)
        kernel = flash.TorchKernel()
        output, lse_HQ = kernel.forward(query, key, key, call, SCALE)
        assert (output.shape, lse_HQ.shape, lse_HQ.dtype) == (query.shape, (QUERY_HEADS, queries), torch.float32)
        gradients = kernel.backward(output, (query, key, key, output, lse_HQ), call, SCALE)
        assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, key.shape]


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention"])
def test_layers_that_know_no_tree_are_refused(kind: str) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", kind]
    with pytest.raises(ModelError, match=f"llama: rows of a pack would leak .* found {kind}"):
        attention_windows(config)
