"""Logits of rows that are read, continued, joined and taken apart are those of each row alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.models import attach
from softprompt.prompts import SoftPrompt
from softprompt.serve.engine.kv_cache import Batch, CachedDecoder, Row

METHODS = ("plain", "dpt", "dept", "adept")


@pytest.mark.parametrize("template_prefix", [0, 2])
@torch.no_grad()
def test_logits_through_reading_joining_and_leaving(
    decoder: Backbone, prompt_of: Callable[..., SoftPrompt], template_prefix: int
) -> None:
    """With `template_prefix`, the first tokens of the longer rows were read with their prompts."""
    prompted = attach(decoder, None)
    service = CachedDecoder(prompted)
    prompts = [prompt_of(decoder, seed, method).fold() for seed, method in enumerate(METHODS)]
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 300, (count,), generator=draw).tolist() for count in (3, 1, 9, 6)]
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        state, read = service.kv_prefix(prompt), min(template_prefix, len(text) - 1)
        rows.append(Row(text[read:], prompt, service.template_prefix(prompt, state, text[:read]) if read else state))
    tokens = torch.randint(5, 300, (4, 12), generator=draw)

    def check(logits: Tensor, which: list[int]) -> None:
        for ours, row in zip(logits, which, strict=True):
            expected = prompted(torch.tensor([texts[row]]), prompts=[prompts[row]]).logits[0, -1]
            # float32 sums in another order, on logits of about 10.
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)

    def decode_next(batch: Batch, which: list[int], step: int) -> None:
        for row in which:
            texts[row].append(int(tokens[row, step]))
        check(service.decode_next(batch, tokens[which, step]), which)

    first, logits = service.prefill(rows[:2], room=1)
    check(logits, [0, 1])
    for step in range(3):  # past the room, so that the buffers are made anew
        decode_next(first, [0, 1], step)
    second, logits = service.prefill(rows[2:])
    check(logits, [2, 3])
    both = service.joined([(batch, place) for batch in (first, second) for place in range(2)])
    for step in range(3, 6):
        decode_next(both, [0, 1, 2, 3], step)
    left = service.select(both, [2, 0], room=0)
    for step in range(6, 8):
        decode_next(left, [2, 0], step)
    assert left.mask.shape[1] == max(prompts[row].prompt().shape[0] + len(texts[row]) for row in (0, 2))


@torch.no_grad()
def test_a_pass_that_fails_halfway_leaves_the_batch_as_it_was(
    tiny_backbone: Callable[[str], Backbone], prompt_of: Callable[..., SoftPrompt]
) -> None:
    backbone = tiny_backbone("llama")
    service = CachedDecoder(attach(backbone, None))
    prompt = prompt_of(backbone, 0).fold()
    batch, _ = service.prefill([Row([7, 8], prompt, service.kv_prefix(prompt))], room=4)
    last = backbone.model.model.layers[-1]

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    hook = last.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        service.decode_next(batch, torch.tensor([99]))
    hook.remove()
    ours = service.decode_next(batch, torch.tensor([9]))
    expected = attach(backbone, None)(torch.tensor([[7, 8, 9]]), prompts=[prompt]).logits[:, -1]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_no_column_slides_out_of_the_window_before_its_row_is_as_wide(
    tiny_backbone: Callable[[str], Backbone], prompt_of: Callable[..., SoftPrompt]
) -> None:
    """A long text beside a long prompt, which together are wider than either row."""
    backbone = tiny_backbone("mistral")
    prompted = attach(backbone, None)
    service = CachedDecoder(prompted)
    assert service.window == 128
    prompts = [prompt_of(backbone, seed, "plain", length).fold() for seed, length in enumerate((4, 68))]
    states = [service.kv_prefix(prompt) for prompt in prompts]

    def rows(longest: int) -> list[Row]:
        texts = list(range(5, 5 + longest)), [7, 8]
        return [Row(text, prompt, state) for text, prompt, state in zip(texts, prompts, states, strict=True)]

    batch, _ = service.prefill(rows(59), room=1)
    ours = service.decode_next(batch, torch.tensor([9, 9]))[1:]
    expected = prompted(torch.tensor([[7, 8, 9]]), prompts=prompts[1:]).logits[:, -1]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    service.prefill(rows(60))
    with pytest.raises(ValueError, match="window of 128"):
        service.prefill(rows(60), room=1)
