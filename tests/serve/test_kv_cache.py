"""Logits of rows that are prefilled, decoded, joined and selected equal those of each row alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.backbones.kernels.packed_linear import PackedWeights
from softprompt.models import attach
from softprompt.prompts import SoftPrompt
from softprompt.serve.engine.kv_cache import Batch, CachedDecoder, Row

METHODS = ("plain", "dpt", "dept", "adept")


@pytest.mark.parametrize("template_prefix", [0, 2])
@torch.no_grad()
def test_joined_and_selected_rows_equal_rows_alone(
    decoder: Backbone, prompt_of: Callable[..., SoftPrompt], template_prefix: int
) -> None:
    """With `template_prefix`, the first tokens of the longer rows are cached with their prompts."""
    prompted = attach(decoder, None)
    cached = CachedDecoder(prompted)
    prompts = [prompt_of(decoder, seed, method).fold() for seed, method in enumerate(METHODS)]
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 300, (count,), generator=draw).tolist() for count in (3, 1, 9, 6)]
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        kv_prefix, length = cached.kv_prefix(prompt), min(template_prefix, len(text) - 1)
        if length:
            kv_prefix = cached.template_prefix(prompt, kv_prefix, text[:length])
        rows.append(Row(text[length:], prompt, kv_prefix))
    tokens = torch.randint(5, 300, (4, 12), generator=draw)

    def check(logits: Tensor, rows_: list[int]) -> None:
        for ours, row in zip(logits, rows_, strict=True):
            expected = prompted(torch.tensor([texts[row]]), prompts=[prompts[row]]).logits[0, -1]
            # float32 sums in another order, on logits of about 10.
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)

    def decode_next(batch: Batch, rows_: list[int], step: int) -> None:
        for row in rows_:
            texts[row].append(int(tokens[row, step]))
        check(cached.decode_next(batch, tokens[rows_, step]), rows_)

    first, logits = cached.prefill(rows[:2], room=1)
    check(logits, [0, 1])
    for step in range(3):  # beyond the room, so that the buffers grow
        decode_next(first, [0, 1], step)
    second, logits = cached.prefill(rows[2:])
    check(logits, [2, 3])
    both = cached.concat([(batch, row) for batch in (first, second) for row in range(2)])
    for step in range(3, 6):
        decode_next(both, [0, 1, 2, 3], step)
    left = cached.select(both, [2, 0], room=0)
    for step in range(6, 8):
        decode_next(left, [2, 0], step)
    assert left.mask.shape[1] == max(prompts[row].prompt().shape[0] + len(texts[row]) for row in (0, 2))


@torch.no_grad()
def test_failed_pass_leaves_the_batch_unchanged(
    tiny_backbone: Callable[[str], Backbone], prompt_of: Callable[..., SoftPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone("llama")
    cached = CachedDecoder(attach(backbone, None))
    prompt = prompt_of(backbone, 0).fold()
    batch, _ = cached.prefill([Row([7, 8], prompt, cached.kv_prefix(prompt))], room=4)
    last, product = backbone.model.model.layers[-1], PackedWeights.__call__

    def broken(packed: PackedWeights, inputs: Any, *layers: Any) -> Any:
        if last.self_attn.q_proj in layers:
            raise RuntimeError("broken")
        return product(packed, inputs, *layers)

    monkeypatch.setattr(PackedWeights, "__call__", broken)
    with pytest.raises(RuntimeError, match="broken"):
        cached.decode_next(batch, torch.tensor([99]))
    monkeypatch.setattr(PackedWeights, "__call__", product)
    ours = cached.decode_next(batch, torch.tensor([9]))
    expected = attach(backbone, None)(torch.tensor([[7, 8, 9]]), prompts=[prompt]).logits[:, -1]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_window_is_checked_for_the_padded_width(
    tiny_backbone: Callable[[str], Backbone], prompt_of: Callable[..., SoftPrompt]
) -> None:
    """A long text and another row's long prompt, which together are wider than either row."""
    backbone = tiny_backbone("mistral")
    prompted = attach(backbone, None)
    cached = CachedDecoder(prompted)
    assert cached.prompted.window == 128
    prompts = [prompt_of(backbone, seed, "plain", length).fold() for seed, length in enumerate((4, 68))]
    states = [cached.kv_prefix(prompt) for prompt in prompts]

    def rows(longest: int) -> list[Row]:
        texts = list(range(5, 5 + longest)), [7, 8]
        return [Row(text, prompt, state) for text, prompt, state in zip(texts, prompts, states, strict=True)]

    batch, _ = cached.prefill(rows(59), room=1)
    ours = cached.decode_next(batch, torch.tensor([9, 9]))[1:]
    expected = prompted(torch.tensor([[7, 8, 9]]), prompts=prompts[1:]).logits[:, -1]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    cached.prefill(rows(60))
    with pytest.raises(ValueError, match="window of 128"):
        cached.prefill(rows(60), room=1)
