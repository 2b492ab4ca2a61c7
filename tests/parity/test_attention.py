"""Our CPU attention gives what torch's fused kernel gives, values and gradients."""

import pytest
import torch
from torch.testing import assert_close

from softprompt.attention import grouped_attention


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
