"""Our CPU attention equals torch's fused kernel, values and gradients, and `choose_kernel` names what runs."""

from typing import Any, get_args

import pytest
import torch
from torch.testing import assert_close

from softprompt.backbones.kernels import attention, grouped
from softprompt.backbones.kernels.attention import Kernel, attention_forward, choose_kernel
from softprompt.backbones.kernels.grouped import grouped_attention
from softprompt.backbones.kernels.varlen import VarlenLayout
from softprompt.backbones.kernels.varlen_attention import varlen_attention, varlen_sdpa

sdpa = torch.nn.functional.scaled_dot_product_attention


def causal_mask_with_padding(batch: int, seq: int, keys: int) -> torch.Tensor:
    mask = torch.ones(seq, keys, dtype=torch.bool).tril(keys - seq).expand(batch, 1, -1, -1).clone()
    mask[0, :, :, 1:3] = False
    return mask


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_grouped_attention_equals_sdpa(groups: int, dtype: torch.dtype, tolerance: float) -> None:
    """Float32 differs by the order of sums; bfloat16 by one rounding of the weights."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2 * groups, 5, 8, generator=generator).to(dtype).requires_grad_()
    key, value = (torch.randn(2, 2, 12, 8, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    upstream = torch.randn(2, 2 * groups, 5, 8, generator=generator).to(dtype)
    mask = causal_mask_with_padding(2, 5, 12)
    repeated = [tensor.repeat_interleave(groups, 1) for tensor in (key, value)]
    expected = sdpa(query, *repeated, attn_mask=mask, scale=0.3)
    output = grouped_attention(query, key, value, mask, 0.3)
    assert_close(output, expected, atol=tolerance, rtol=tolerance)
    expected_grads = torch.autograd.grad(expected, (query, key, value), upstream)
    for ours, theirs in zip(torch.autograd.grad(output, (query, key, value), upstream), expected_grads, strict=True):
        assert_close(ours, theirs, atol=2 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("max_saved_keys", [512, 0])
@pytest.mark.parametrize("batches", [1, 2])
def test_grouped_attention_bias_equals_sdpa(batches: int, max_saved_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5's relative position bias, with the weights saved for the backward pass and recomputed in it."""
    monkeypatch.setattr(grouped, "MAX_SAVED_KEYS", max_saved_keys)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, generator=generator).requires_grad_() for _ in range(3))
    bias, upstream = torch.randn(batches, 3, 5, 5, generator=generator), torch.randn(2, 3, 5, 8, generator=generator)
    mask = causal_mask_with_padding(2, 5, 5)
    additive_mask = torch.where(mask, bias, torch.finfo(torch.float32).min)
    expected = sdpa(query, key, value, attn_mask=additive_mask, scale=1.0)
    output = grouped_attention(query, key, value, mask, 1.0, bias)
    assert_close(output, expected, atol=1e-5, rtol=1e-5)
    expected_grads = torch.autograd.grad(expected, (query, key, value), upstream)
    for ours, theirs in zip(torch.autograd.grad(output, (query, key, value), upstream), expected_grads, strict=True):
        assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_grouped_attention_bfloat16_keeps_large_scores_exact() -> None:
    """Scores near 120, where bfloat16 has steps of 0.5; seen failing with scores in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    query, key = torch.full((1, 1, 6, 16), 4.0), torch.full((1, 1, 9, 16), 8.0)
    query, key = (states + 0.1 * torch.randn(states.shape, generator=generator) for states in (query, key))
    value = torch.randn(1, 1, 9, 16, generator=generator).bfloat16()
    query, key = query.bfloat16(), key.bfloat16()
    mask = torch.ones(1, 1, 6, 9, dtype=torch.bool)
    exact = sdpa(query.double(), key.double(), value.double(), mask, scale=0.25)
    assert_close(grouped_attention(query, key, value, mask, 0.25).double(), exact, atol=2e-2, rtol=0)


LAYOUTS = {
    "equal lengths": ([4], [3, 3, 3], [0, 0, 0]),
    "unequal lengths": ([4], [3, 1, 5], [0, 0, 0]),
    "three prompts": ([4, 1, 6], [3, 1, 5, 2], [2, 0, 1, 2]),
    "no prompt": ([], [3, 1, 5], [0, 0, 0]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("max_saved_keys", [0, 512])
@pytest.mark.parametrize("kernel", ["varlen_grouped", "varlen_sdpa"])
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_attention_equals_sdpa_per_row(
    name: str, kernel: str, max_saved_keys: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row as `[prompt; row]`, each prompt on its own. Seen failing with a looser mask."""
    monkeypatch.setattr(grouped, "MAX_SAVED_KEYS", max_saved_keys)
    prompts, rows, index = LAYOUTS[name]
    layout = VarlenLayout(prompts, rows, torch.tensor(index), causal=causal)
    generator = torch.Generator().manual_seed(3)
    total = sum(prompts) + sum(rows)
    exact = [torch.randn(1, heads, total, 8, generator=generator).double() for heads in (6, 2, 2)]
    query, key, value = (states.float().requires_grad_() for states in exact)
    if kernel == "varlen_grouped":
        output = varlen_attention(query, key, value, layout, 0.3)
    else:
        output = varlen_sdpa(query, key, value, layout, 0.3, 0.0)
    for states in exact:
        states.requires_grad_()
    prompt_starts = [sum(prompts[:prompt]) for prompt in range(len(prompts))]
    expected = []
    for start, length in zip(prompt_starts, prompts, strict=True):
        expected.append(repeated_sdpa(*(states[:, :, start : start + length] for states in exact), causal=causal))
    start = sum(prompts)
    for length, prompt in zip(rows, index, strict=True):
        row = [states[:, :, start : start + length] for states in exact]
        if prompts:
            span = slice(prompt_starts[prompt], prompt_starts[prompt] + prompts[prompt])
            row = [torch.cat([states[:, :, span], part], 2) for states, part in zip(exact, row, strict=True)]
        expected.append(repeated_sdpa(*row, causal=causal)[:, :, -length:])
        start += length
    expected_output = torch.cat(expected, 2).transpose(1, 2)
    assert_close(output.double(), expected_output, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(expected_output.shape, generator=generator)
    expected_grads = torch.autograd.grad(expected_output, exact, upstream.double())
    for ours, theirs in zip(torch.autograd.grad(output, (query, key, value), upstream), expected_grads, strict=True):
        assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


def repeated_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool) -> torch.Tensor:
    return sdpa(query, *(states.repeat_interleave(3, 1) for states in (key, value)), is_causal=causal, scale=0.3)


def mask_of(*shape: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def layout_of(*, cached: bool = False) -> VarlenLayout:
    states = (torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8))
    return VarlenLayout([2], [3], torch.tensor([0]), cached_kv=[states] if cached else None)


PACKED = {"batch": 1, "seq": 5, "mask": mask_of(1, 1, 1, 1)}
CACHED = {"batch": 1, "seq": 3, "mask": mask_of(1, 1, 1, 1)}
TABLE: dict[str, tuple[dict[str, Any], Kernel]] = {
    "varlen layout": ({**PACKED, "layout": {}}, "varlen_grouped"),
    "varlen layout, bfloat16": ({**PACKED, "layout": {}, "dtype": torch.bfloat16}, "varlen_grouped"),
    "varlen layout, no gradient": ({**PACKED, "layout": {}, "grad": False}, "varlen_grouped"),
    "varlen layout, dropout": ({**PACKED, "layout": {}, "dropout": 0.1}, "varlen_sdpa"),
    "varlen layout, cached prefix": ({**CACHED, "layout": {"cached": True}}, "varlen_sdpa"),
    "varlen layout, other device": ({**PACKED, "layout": {}, "device": "meta"}, "varlen_sdpa"),
    "candidates over one text": ({"queries": 6, "mask": mask_of(2, 1, 1, 5)}, "fold_candidates"),
    "mask": ({"mask": mask_of(2, 1, 5, 5)}, "grouped"),
    "mask shared by the batch": ({"mask": mask_of(1, 1, 5, 5)}, "grouped"),
    "mask, no gradient": ({"mask": mask_of(2, 1, 5, 5), "grad": False}, "grouped"),
    "mask, bfloat16": ({"mask": mask_of(2, 1, 5, 5), "dtype": torch.bfloat16}, "grouped"),
    "mask, wide heads": ({"mask": mask_of(2, 1, 5, 5), "head_dim": 320}, "grouped"),
    "mask, narrow values": ({"mask": mask_of(2, 1, 5, 5), "value_dim": 4}, "grouped"),
    "mask, more than the saved keys": ({"mask": mask_of(2, 1, 5, 600), "keys": 600}, "grouped"),
    "mask of a sliding window": ({"mask": mask_of(2, 1, 5, 5).tril().triu(-2)}, "grouped"),
    "mask, bias": ({"mask": mask_of(2, 1, 5, 5), "bias": {}, "heads": 2}, "grouped"),
    "bias, not causal": ({"bias": {}, "heads": 2}, "grouped"),
    "bias, causal": ({"bias": {}, "heads": 2, "is_causal": True}, "sdpa"),
    "trained bias": ({"mask": mask_of(2, 1, 5, 5), "bias": {"requires_grad": True}, "heads": 2}, "sdpa"),
    "bias, shared key-value heads": ({"mask": mask_of(2, 1, 5, 5), "bias": {}}, "sdpa"),
    "no mask, not causal": ({}, "sdpa"),
    "no mask, causal": ({"is_causal": True}, "sdpa"),
    "additive mask": ({"mask": mask_of(2, 1, 5, 5, dtype=torch.float32)}, "sdpa"),
    "mask per head": ({"mask": mask_of(2, 4, 5, 5)}, "sdpa"),
    "one query token": ({"mask": mask_of(2, 1, 1, 5), "seq": 1, "keys": 5}, "sdpa"),
    "dropout": ({"mask": mask_of(2, 1, 5, 5), "dropout": 0.1}, "sdpa"),
    "other device": ({"mask": mask_of(2, 1, 5, 5), "device": "meta"}, "sdpa"),
}
RUNS = {
    "varlen_grouped": "varlen_attention",
    "varlen_sdpa": "varlen_sdpa",
    "fold_candidates": "_fold_candidates",
    "grouped": "grouped_attention",
    "sdpa": "sdpa_attention_forward",
}
"""The function behind each path."""


class Module(torch.nn.Module):
    """What transformers' SDPA reads of an attention module."""

    num_key_value_groups = 2

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


@pytest.mark.parametrize("case", TABLE)
def test_attention_forward_runs_the_chosen_kernel(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the table in `choose_kernel`'s docstring; no other path runs than the one it names."""
    options, expected = TABLE[case]
    settings: dict[str, Any] = {
        "batch": 2, "heads": 4, "seq": 5, "head_dim": 8, "dtype": torch.float32, "device": "cpu", "grad": True,
        "mask": None, "dropout": 0.0, "is_causal": False, **options,
    }  # fmt: skip
    batch, head_dim, seq = settings["batch"], settings["head_dim"], settings["seq"]
    keys = settings.get("keys", seq)

    def states(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return drawn.to(settings["dtype"]).to(settings["device"]).requires_grad_(settings["grad"])

    query = states(settings.get("queries", batch), settings["heads"], seq, head_dim)
    key, value = states(batch, 2, keys, head_dim), states(batch, 2, keys, settings.get("value_dim", head_dim))
    mask, dropout = settings["mask"], settings["dropout"]
    layout = layout_of(**settings["layout"]) if "layout" in settings else None
    bias = None
    if "bias" in settings:
        bias = torch.randn(1, settings["heads"], seq, keys).requires_grad_(settings["bias"].get("requires_grad", False))
    is_causal = settings["is_causal"]
    assert choose_kernel(query, key, mask, layout=layout, bias=bias, dropout=dropout, is_causal=is_causal) == expected

    calls = []
    for kernel, function in RUNS.items():
        output = (
            torch.zeros(1) if kernel in ("varlen_grouped", "varlen_sdpa", "fold_candidates") else torch.zeros(1, 1, 1)
        )
        result = (output, None) if kernel == "sdpa" else output

        def run(*args: Any, kernel: str = kernel, result: Any = result, **kwargs: Any) -> Any:
            calls.append(kernel)
            return result

        monkeypatch.setattr(attention, function, run)
    extra = {} if bias is None else {"position_bias": bias}
    attention_forward(Module(is_causal), query, key, value, mask, dropout, None, layout, **extra)
    assert calls == [expected]


def test_choose_kernel_table_lists_every_kernel() -> None:
    table = [line for line in (choose_kernel.__doc__ or "").splitlines() if line.strip().startswith("| `")]
    assert [line.split("`")[1] for line in table] == list(get_args(Kernel)) == list(RUNS)
    assert {kernel for _, kernel in TABLE.values()} == set(RUNS)


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("max_saved_keys", [512, 0])
def test_varlen_attention_uses_sdpa_if_no_weights_are_saved(
    needs_grad: bool, max_saved_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "MAX_SAVED_KEYS", max_saved_keys)
    calls = []

    def counted_sdpa(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted_sdpa)
    query, key, value = (torch.randn(1, heads, 5, 8).requires_grad_(needs_grad) for heads in (4, 2, 2))
    varlen_attention(query, key, value, layout_of(), 0.3)
    assert len(calls) == (0 if needs_grad and max_saved_keys else 2), "one call for the prompt and one for the row"
