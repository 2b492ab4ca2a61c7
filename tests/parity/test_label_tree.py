"""Candidates of several tokens score what each gives alone behind its row, however they are cut into passes.

The reference is each candidate concatenated with its prompt and text and run alone: no mask, no padding, no cache.
"""

from collections.abc import Callable

import pytest
import torch
from cases import assert_near, concatenated, gradients, padded, prompts_of, rows_of
from torch import Tensor, nn

from softprompt.backbones import Backbone
from softprompt.models import attach, label_tree
from softprompt.models.label_tree import LabelTree
from softprompt.models.verify import forget
from softprompt.prompts import SoftPrompt

MakeBackbone = Callable[[str], Backbone]
DECODERS = ("llama", "gpt2", "gpt_neox", "opt", "qwen3", "gemma", "gemma2", "bloom", "mistral")
ENCODER_DECODERS = ("t5", "t5_1.1", "mt5", "bart", "bart_forced", "marian")
CANDIDATES = ((11, 12, 13, 14), (11, 12, 15), (11, 16), (17,), (18, 12, 13), (19, 12), (11, 12, 13, 20, 21))
"""Shared beginnings of one to three tokens, the same token under several parents, and one of a single token."""
TEXTS = (7, 1, 4, 9, 3)
INDEX = (2, 0, 1, 0, 2)


def single_row(backbone: Backbone, prompt: SoftPrompt, text: Tensor, candidate: tuple[int, ...]) -> Tensor:
    """One candidate's log-probability, by concatenation."""
    answer = torch.tensor(candidate)
    if backbone.architecture == "causal":
        logits = concatenated(backbone, prompt, torch.cat([text, answer]))[-1 - len(answer) : -1]
    else:
        answer = torch.cat([answer, torch.tensor([1])])
        forced = backbone.model.generation_config.forced_bos_token_id
        config = backbone.model.config
        lead = [config.decoder_start_token_id] + ([] if forced is None else [forced])
        own = prompt.shift(backbone.model.get_input_embeddings()(text)[None], text[None], torch.arange(len(text))[None])
        logits = backbone.model(
            inputs_embeds=torch.cat([prompt.prompt()[None], own], 1),
            decoder_input_ids=torch.tensor([[*lead, *answer[:-1].tolist()]]),
        ).logits[0, len(lead) - 1 :]
    return logits.log_softmax(-1).gather(1, answer[:, None]).sum()


def reference(backbone: Backbone, prompts: list[SoftPrompt], rows: list[Tensor]) -> Tensor:
    return torch.stack(
        [
            torch.stack([single_row(backbone, prompts[number], row, candidate) for candidate in CANDIDATES])
            for number, row in zip(INDEX, rows, strict=True)
        ]
    )


def cut(monkeypatch: pytest.MonkeyPatch, tokens: int, columns: int = 2**15) -> None:
    monkeypatch.setattr(label_tree, "MAX_TOKENS", tokens)
    monkeypatch.setattr(label_tree, "MAX_COLUMNS", columns)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [4096, 20, 6, 1], ids=["one_pass", "parts", "rows_apart", "one_by_one"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_tree_scores_and_gradients_match_single_rows(
    name: str, tokens: int, side: str, tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, rows = tiny_backbone(name), rows_of(TEXTS)
    prompts = [prompt.eval() for prompt in prompts_of(backbone)]
    cut(monkeypatch, tokens)
    ids, mask = padded(rows, side, 3)
    scores = attach(backbone).score(ids, mask, CANDIDATES, prompts=prompts, index=torch.tensor(INDEX))
    expected = reference(backbone, prompts, rows)
    assert_near(scores, expected)
    classes = torch.tensor([0, 3, 6, 1, 4])
    pairs = zip(
        gradients(nn.functional.cross_entropy(scores, classes), prompts),
        gradients(nn.functional.cross_entropy(expected, classes), prompts),
        strict=True,
    )
    for ours, theirs in pairs:
        assert float(theirs.abs().max()) > 0
        assert_near(ours, theirs, 2e-4)


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "bloom"])
def test_decoders_with_explicit_positions_take_tree(name: str, tiny_backbone: MakeBackbone) -> None:
    assert label_tree.takes_tree(attach(tiny_backbone(name)))


def test_alibi_takes_no_tree(tiny_backbone: MakeBackbone) -> None:
    assert not label_tree.takes_tree(attach(tiny_backbone("bloom")))


@pytest.mark.parametrize("position", ["prefix", "after_bos", "suffix"])
def test_tree_scores_with_every_prompt_position(
    position: str, tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, rows = tiny_backbone("llama"), rows_of(TEXTS)
    prompted, prompts = attach(backbone, prompt_position=position), prompts_of(backbone)
    arguments = *padded(rows, "left", 2), CANDIDATES, [prompt.eval() for prompt in prompts], torch.tensor(INDEX)
    with torch.no_grad():
        tree = prompted.score(*arguments)
        monkeypatch.setattr(label_tree, "takes_tree", lambda prompted: False)
        assert_near(prompted.score(*arguments), tree)


def test_eager_attention_takes_tree(tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, rows = tiny_backbone("qwen3"), rows_of(TEXTS)
    monkeypatch.setattr(backbone.model.config, "_attn_implementation", "eager")
    forget(backbone.model)
    prompted, prompts = attach(backbone), [prompt.eval() for prompt in prompts_of(backbone)]
    assert label_tree.takes_tree(prompted)
    scores = prompted.score(*padded(rows, "left", 3), CANDIDATES, prompts, torch.tensor(INDEX))
    assert_near(scores, reference(backbone, prompts, rows))
    forget(backbone.model)  # which the other tests share


def test_each_prefix_is_one_node() -> None:
    tree = LabelTree.of(CANDIDATES)
    assert len(tree.tokens) == len({c[:end] for c in CANDIDATES for end in range(1, len(c))}) == 7
    assert [tree.depths[node] for node, _ in tree.edges] == [0, 1, 2, 1, 0, 0, 1, 0, 2, 3]


@pytest.mark.parametrize("name", ["llama", "bloom", "t5", "bart"])
def test_pass_size_is_bounded_for_many_candidates(
    name: str, tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(name)
    prompted, rows = attach(backbone), rows_of(TEXTS)
    candidates = [(a, b, c) for a in range(11, 16) for b in range(20, 26) for c in range(30, 36)]
    prompted.score(*padded(rows, "left", 0), candidates[:2])  # a model is tried once
    cut(monkeypatch, 64)
    sizes = []
    with backbone.model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: sizes.append(inputs[0][..., 0].numel())
    ):
        prompted.score(*padded(rows, "left", 0), candidates)
    assert len(sizes) > 3
    assert max(sizes) <= 64


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_text_kv_is_not_copied_per_candidate(
    name: str, tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    before = label_tree.SharedLayer.__init__

    def noted(self: label_tree.SharedLayer, keys: Tensor, values: Tensor, times: int = 1) -> None:
        if keys.shape[2] > 1:  # a decoder's own start token alone may be repeated
            made.append(times)
        before(self, keys, values, times)

    monkeypatch.setattr(label_tree.SharedLayer, "__init__", noted)
    backbone = tiny_backbone(name)
    label_tree.takes_tree(attach(backbone)) if backbone.architecture == "causal" else None
    made.clear()
    attach(backbone).score(*padded(rows_of(TEXTS), "left", 0), CANDIDATES)
    assert made
    assert set(made) == {1}
