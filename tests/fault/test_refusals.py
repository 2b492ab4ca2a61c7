"""Inputs and models that cannot be exact are refused in one sentence before anything is computed."""

from collections.abc import Callable

import pytest
import torch
import transformers

from softprompt.backbones import Backbone, load
from softprompt.models import PROMPTED_MODELS, PreparedPrompts, attach
from softprompt.prompts import Folded

pytestmark = pytest.mark.usefixtures("unchecked")
MakeBackbone = Callable[[str], Backbone]
IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def prompt_of(backbone: Backbone, length: int = 4) -> Folded:
    return Folded(torch.randn(length, backbone.dim, generator=torch.Generator().manual_seed(0)))


def refused(call: Callable[[], object], *words: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the words are compared below)
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def test_rows_beyond_the_sliding_window_are_refused(tiny_backbone: MakeBackbone) -> None:
    for name in ("mistral", "gemma2"):
        backbone = tiny_backbone(name)
        prompted = attach(backbone, prompt_of(backbone))
        prompted(torch.full((1, 124), 5))
        refused(lambda a=prompted: a(torch.full((1, 125), 5)), "sliding window of 128", name)
        refused(lambda a=prompted: list(a.generate(torch.full((1, 120), 5), max_new_tokens=9)), "window of 128")
        # Four tokens of the longest candidate are fed back after the text.
        refused(lambda a=prompted: a.score(torch.full((1, 121), 5), None, [[5, 6, 7, 8, 9]]), "window of 128")


def test_rows_beyond_the_positions_are_refused(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    prompted = attach(backbone, prompt_of(backbone))
    prompted(torch.full((1, 252), 5))
    refused(lambda: prompted(torch.full((1, 253), 5)), "257 positions", "llama has 256")


def test_padding_does_not_count_as_positions(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    ids = torch.full((1, 400), 5)
    mask = (torch.arange(400) >= 390).long()[None]
    assert attach(backbone, prompt_of(backbone))(ids, mask).logits.shape == (1, 400, 300)


def test_recurrent_model_is_refused(tokenizer: object) -> None:
    config = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    refused(lambda: attach(Backbone(model, tokenizer, "tiny-mamba", "tiny-mamba", "causal")), "tiny-mamba", "refused")


def test_layers_with_state_are_refused(tokenizer: object) -> None:
    config = transformers.Qwen3NextConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    refused(lambda: attach(Backbone(model, tokenizer, "tiny-next", "n", "causal")), "tiny-next", "linear_attention")


def test_inexact_prefix_is_refused(tiny_backbone: MakeBackbone, tokenizer: object) -> None:
    """A decoder whose output depends on how many rows came before in the cache: the check at attaching sees it."""
    model = transformers.AutoModelForCausalLM.from_config(tiny_backbone("gpt2").model.config)
    head = model.lm_head.forward
    seen = {"cached": 0}
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            seen.update(cached=kwargs["past_key_values"].get_seq_length())
            if kwargs.get("past_key_values") is not None
            else None
        ),
        with_kwargs=True,
    )
    model.lm_head.forward = lambda hidden: head(hidden) + seen["cached"]
    backbone = Backbone(model, tokenizer, "odd-cache", "odd-cache", "causal")
    refused(lambda: attach(backbone), "odd-cache", "different logits with a shared prefix", "refused")


def test_prompt_of_another_width_is_refused(tiny_backbone: MakeBackbone) -> None:
    narrow = Folded(torch.zeros(4, 16))
    refused(lambda: attach(tiny_backbone("llama"), narrow)(IDS), "16 wide", "embeds in 32", "another backbone")
    wide = Folded(torch.zeros(4, 32))
    refused(lambda: attach(tiny_backbone("opt"), wide)(IDS), "32 wide", "embeds in 16")


def test_wrong_prompt_index_is_refused(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    prompted, two = attach(backbone), [prompt_of(backbone), prompt_of(backbone, 6)]
    refused(lambda: prompted(IDS, prompts=two), "2 prompts", "no index", "2 rows")
    for index in ([0, 2], [-1, 0], [0], [0, 1, 1]):
        refused(lambda i=index: prompted(IDS, prompts=two, index=torch.tensor(i)), f"index is {index}", "0 to 1")


def test_wrong_rows_and_masks_are_refused(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    prompted = attach(backbone, prompt_of(backbone))
    empty = torch.tensor([[1, 1, 1], [0, 0, 0]])
    refused(lambda: prompted(IDS, empty), "rows [1] have no token")
    refused(lambda: prompted(IDS, torch.ones(2, 4, dtype=torch.long)), "(2, 4)", "(2, 3)")
    refused(lambda: prompted(IDS, torch.full((2, 3), 7)), "attention_mask", "0 and 1")
    refused(lambda: prompted(IDS, None, torch.zeros(2, 5, dtype=torch.long)), "labels are (2, 5)")
    refused(lambda: prompted(IDS, None, torch.full((2, 3), -100)), "no row has a label")


@pytest.mark.parametrize("candidates", [[], [[5], []]])
def test_candidates_without_tokens_are_refused(tiny_backbone: MakeBackbone, candidates: list[list[int]]) -> None:
    prompted = attach(tiny_backbone("llama"))
    refused(lambda: prompted.score(IDS, None, candidates), "candidates are", "at least one token")


def test_encoding_of_another_architecture_is_refused(tiny_backbone: MakeBackbone) -> None:
    class Foreign(PreparedPrompts):
        prompts = ()

    refused(lambda: attach(tiny_backbone("llama"))(IDS, prompts=Foreign()), "Foreign", "another architecture")


def test_unsupported_architecture_is_refused(
    tiny_backbone: MakeBackbone, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(PROMPTED_MODELS, "vision")
    odd = Backbone(tiny_backbone("llama").model, tokenizer, "vit", "vit", "vision")
    refused(lambda: attach(odd), "vit", "kind vision", "causal")


def test_missing_backbone_is_refused() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"backbone 'no-such-model' is neither a folder, a \.gguf file, an asset"
    ):
        load("no-such-model")
    with pytest.raises(FileNotFoundError, match=r"backbone 'nowhere\.gguf' does not exist; give the path"):
        load("nowhere.gguf")


def test_folder_without_a_model_is_refused(tmp_path: object) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; give a folder that transformers can load"):
        load(str(tmp_path))


def test_missing_device_is_refused(llama_folder: object) -> None:
    with pytest.raises(ValueError, match="device 'cuda:99' is not available; use auto, cpu"):
        load(str(llama_folder), dtype="float32", device="cuda:99")
