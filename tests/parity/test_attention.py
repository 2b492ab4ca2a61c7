"""Our CPU attention gives what torch's fused kernel gives, values and gradients."""

import pytest
import torch
from torch.testing import assert_close

from softprompt.backbones.kernels import attention
from softprompt.backbones.kernels.attention import grouped_attention
from softprompt.backbones.kernels.varlen import VarlenLayout


def causal_with_pads(batch: int, seq: int, keys: int) -> torch.Tensor:
    mask = torch.ones(seq, keys, dtype=torch.bool).tril(keys - seq).expand(batch, 1, -1, -1).clone()
    mask[0, :, :, 1:3] = False
    return mask


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_the_fused_kernel(groups: int, dtype: torch.dtype, tolerance: float) -> None:
    """Float32 differs by the order of sums; bfloat16 by one rounding of the weights."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2 * groups, 5, 8, generator=generator).to(dtype).requires_grad_()
    key, value = (torch.randn(2, 2, 12, 8, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    upstream = torch.randn(2, 2 * groups, 5, 8, generator=generator).to(dtype)
    mask = causal_with_pads(2, 5, 12)
    wide = [tensor.repeat_interleave(groups, 1) for tensor in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=0.3)
    found = grouped_attention(query, key, value, mask, 0.3)
    assert_close(found, expected, atol=tolerance, rtol=tolerance)
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    for ours, theirs in zip(torch.autograd.grad(found, (query, key, value), upstream), wanted, strict=True):
        assert_close(ours, theirs, atol=2 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("kept", [512, 0])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_bias_is_added_to_the_scores(batches: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As T5's relative positions are; with the weights kept for the backward pass, and computed again."""
    monkeypatch.setattr(attention, "MOST_KEPT", kept)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, generator=generator).requires_grad_() for _ in range(3))
    bias, upstream = torch.randn(batches, 3, 5, 5, generator=generator), torch.randn(2, 3, 5, 8, generator=generator)
    mask = causal_with_pads(2, 5, 5)
    wide = torch.where(mask, bias, torch.finfo(torch.float32).min)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=wide, scale=1.0)
    found = grouped_attention(query, key, value, mask, 1.0, bias)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    for ours, theirs in zip(torch.autograd.grad(found, (query, key, value), upstream), wanted, strict=True):
        assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_large_scores_keep_their_precision_in_bfloat16() -> None:
    """Scores near 120, which a bfloat16 can only tell apart by halves; seen failing with scores kept in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    query, key = torch.full((1, 1, 6, 16), 4.0), torch.full((1, 1, 9, 16), 8.0)
    query, key = (one + 0.1 * torch.randn(one.shape, generator=generator) for one in (query, key))
    value = torch.randn(1, 1, 9, 16, generator=generator).bfloat16()
    query, key = query.bfloat16(), key.bfloat16()
    mask = torch.ones(1, 1, 6, 9, dtype=torch.bool)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), mask, scale=0.25
    )
    assert_close(grouped_attention(query, key, value, mask, 0.25).double(), exact, atol=2e-2, rtol=0)


def packed(states: torch.Tensor, start: int, count: int) -> torch.Tensor:
    return states[:, :, start : start + count]


PACKINGS = {
    "even": ([4], [3, 3, 3], [0, 0, 0]),
    "ragged": ([4], [3, 1, 5], [0, 0, 0]),
    "three prompts": ([4, 1, 6], [3, 1, 5, 2], [2, 0, 1, 2]),
    "no prompt": ([], [3, 1, 5], [0, 0, 0]),
}


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("most_kept", [0, 512])
@pytest.mark.parametrize("how", ["grouped", "fused"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_tokens_are_rows_of_their_own(
    name: str, how: str, most_kept: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row as `[prompt; row]` by torch's kernel; a prompt sees itself alone, causally or not. Seen failing with a
    looser mask."""
    monkeypatch.setattr(attention, "MOST_KEPT", most_kept)
    prompts, rows, index = PACKINGS[name]
    packing = VarlenLayout(prompts, rows, torch.tensor(index), causal=causal)
    draw = torch.Generator().manual_seed(3)
    total = sum(prompts) + sum(rows)
    states = [torch.randn(1, heads, total, 8, generator=draw).double() for heads in (6, 2, 2)]
    query, key, value = (one.float().requires_grad_() for one in states)
    if how == "grouped":
        found = attention.varlen_attention(query, key, value, packing, 0.3)
    else:
        found = attention.varlen_sdpa(query, key, value, packing, 0.3, 0.0)
    exact = [one.requires_grad_() for one in states]
    starts = [sum(prompts[:which]) for which in range(len(prompts))]
    expected = []
    for start, count in zip(starts, prompts, strict=True):
        expected.append(by_torch(*(packed(one, start, count) for one in exact), causal=causal))
    place = sum(prompts)
    for count, which in zip(rows, index, strict=True):
        mine = [packed(one, place, count) for one in exact]
        if prompts:
            mine = [
                torch.cat([packed(one, starts[which], prompts[which]), own], 2)
                for one, own in zip(exact, mine, strict=True)
            ]
        expected.append(by_torch(*mine, causal=causal)[:, :, -count:])
        place += count
    wanted = torch.cat(expected, 2).transpose(1, 2)
    assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(wanted.shape, generator=draw)
    theirs = torch.autograd.grad(wanted, exact, upstream.double())
    for ours, one in zip(torch.autograd.grad(found, (query, key, value), upstream), theirs, strict=True):
        assert_close(ours.double(), one, atol=1e-5, rtol=1e-5)


def by_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool) -> torch.Tensor:
    wide = [one.repeat_interleave(3, 1) for one in (key, value)]
    return torch.nn.functional.scaled_dot_product_attention(query, *wide, is_causal=causal, scale=0.3)
