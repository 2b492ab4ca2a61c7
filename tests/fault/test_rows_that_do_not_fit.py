"""Rows, label words and tokens that a model cannot take are refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from softprompt.backbones import Backbone, positions
from softprompt.evaluation.predict import pad_id
from softprompt.models import attach, fresh_head
from softprompt.prompts.plain import Plain

MakeBackbone = Callable[[str], Backbone]
BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
ROPE: dict[str, Any] = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}
PARTS: dict[str, Any] = {"vocab_size": 300, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
USABLE: dict[str, tuple[Callable[[], Any], int | None]] = {
    "bert": (lambda: transformers.BertConfig(**BASE), 256),
    "roberta": (lambda: transformers.RobertaConfig(**BASE), 253),
    "xlm_roberta": (lambda: transformers.XLMRobertaConfig(**BASE), 253),
    "mpnet": (lambda: transformers.MPNetConfig(**BASE), 254),
    "ibert": (lambda: transformers.IBertConfig(**BASE), 253),
    "longformer": (lambda: transformers.LongformerConfig(**BASE, attention_window=8), 253),
    "opt": (lambda: transformers.OPTConfig(**{**BASE, "ffn_dim": 64}, word_embed_proj_dim=32), 256),
    "bart": (lambda: transformers.BartConfig(**PARTS, max_position_embeddings=256), 256),
    "mpt": (lambda: transformers.MptConfig(vocab_size=300, d_model=32, n_layers=1, n_heads=4, max_seq_len=128), 128),
    "phi3": (lambda: transformers.Phi3Config(**BASE, **ROPE, eos_token_id=1, bos_token_id=0), 64),
    "t5": (lambda: transformers.T5Config(vocab_size=300, d_model=32, num_layers=1), None),
}


@pytest.mark.parametrize("name", USABLE)
def test_check_uses_the_positions_of_training(name: str) -> None:
    config, expected = USABLE[name]
    assert positions.max_positions(transformers.AutoModel.from_config(config())) == expected


def test_encoder_and_decoder_have_separate_positions() -> None:
    config = transformers.LEDConfig(
        **PARTS, attention_window=8, max_encoder_position_embeddings=128, max_decoder_position_embeddings=32
    )
    config.max_position_embeddings = None
    model = transformers.LEDModel(config)
    assert (positions.max_positions(model), positions.max_positions(model, "decoder")) == (128, 32)


@pytest.mark.parametrize("name", ["roberta", "mpnet", "bert"])
def test_longest_row_runs_and_a_longer_one_is_refused(name: str, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone(name)
    head = fresh_head(backbone, 2, torch.Generator())
    prompted = attach(backbone, Plain(length=4).build(backbone.host(), torch.Generator()), head=head)
    most = int(backbone.max_positions or 0) - 4
    prompted(torch.full((1, most), 7))
    prompted.check_row([7] * most, (), "row 1 of train")
    with pytest.raises(ValueError, match=rf"row 2 of test has {most + 5} positions"):
        prompted.check_row([7] * (most + 1), (), "row 2 of test")
    with pytest.raises(ValueError, match=f"a row has {most + 5} positions"):
        prompted(torch.full((1, most + 1), 7))


def test_decoder_answer_counts_as_input(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    prompted = attach(backbone, Plain(length=4).build(backbone.host(), torch.Generator()))
    prompted.check_row([7] * 52, [9] * 201, "row 1 of train")  # whose last token is predicted and never fed
    labels = torch.tensor([[-100] * 52 + [9] * 201])
    prompted(torch.full((1, 253), 9), None, labels)
    with pytest.raises(ValueError, match=r"row 6 of train has 257 positions \(4 of the prompt, 52 .*, 202 .*\)"):
        prompted.check_row([7] * 52, [9] * 202, "row 6 of train")


def test_sliding_window_is_a_limit(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match=r"row 1 has 129 positions.* has 128"):
        attach(tiny_backbone("mistral")).check_row([7] * 129, (), "row 1")


def test_encoder_decoder_answer_uses_decoder_positions(tiny_backbone: MakeBackbone) -> None:
    prompted = attach(tiny_backbone("bart"))
    prompted.check_row([7] * 256, [9] * 255, "row 1 of train")
    with pytest.raises(ValueError, match=r"row 2 of dev has an answer of 257 tokens.* 256 positions"):
        prompted.check_row([7], [9] * 256, "row 2 of dev")
    with pytest.raises(ValueError, match="an answer of 300 tokens does not fit the 256 positions"):
        prompted(torch.tensor([[7]]), None, torch.full((1, 300), 9))
    with pytest.raises(ValueError, match="label word 'long' has 257 tokens"):
        prompted.check_candidates(["a", "long"], [(9,), (9,) * 256])


@pytest.mark.parametrize("name", ["llama", "bart", "bert", "bert_mlm"])
def test_token_without_embedding_is_named(name: str, tiny_backbone: MakeBackbone, tokenizer: Any) -> None:
    backbone = tiny_backbone(name)
    more = type(tokenizer)(
        tokenizer_object=backbone.tokenizer._tokenizer.__class__.from_str(backbone.tokenizer._tokenizer.to_str()),
        mask_token="<mask>",
        sep_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    more.add_tokens([f"@{number}" for number in range(400)])
    with_shared_prefix = Backbone(backbone.model, more, name, name, backbone.architecture)
    head = fresh_head(with_shared_prefix, 2, torch.Generator())
    prompted, text = attach(with_shared_prefix, head=head), more.convert_ids_to_tokens(300)
    with pytest.raises(ValueError, match=rf"row 21 of train has the token '{text}' \(300\)"):
        prompted.check_row([5, 300], (), "row 21 of train")
    with pytest.raises(ValueError, match=f"has the token '{text}'"):
        prompted(torch.tensor([[5, 300, 6]]))
    if head is None:
        with pytest.raises(ValueError, match=f"label word 'x' has the token '{text}'"):
            prompted.check_candidates(["x"], [(300,)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "bert", "bert_mlm"])
def test_padding_may_be_any_id(name: str, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone(name)
    prompted = attach(backbone, head=fresh_head(backbone, 2, torch.Generator().manual_seed(0)))
    mask, result = torch.tensor([[1, 1, 0], [1, 1, 1]]), []
    for padding in (2, 300, 70000, -1):
        result.append(prompted(torch.tensor([[5, 6, padding], [7, 8, 9]]), mask).logits[:, :1])
    assert all(torch.equal(result[0], other) for other in result)


def test_default_padding_id_has_an_embedding(tiny_backbone: MakeBackbone, tokenizer: Any) -> None:
    from types import SimpleNamespace

    backbone = tiny_backbone("llama")
    given = SimpleNamespace(pad_token_id=300, eos_token_id=1)
    assert pad_id(Backbone(backbone.model, given, "a", "a", "causal")) == 1
    given = SimpleNamespace(pad_token_id=None, eos_token_id=None)
    assert pad_id(Backbone(backbone.model, given, "a", "a", "causal")) == 0
    assert pad_id(backbone) == 2


def test_label_words_that_do_not_fit_a_mask_are_named(tiny_backbone: MakeBackbone) -> None:
    prompted = attach(tiny_backbone("bert_mlm"))
    prompted.check_candidates([" a", " b"], [(5,), (6,)])
    with pytest.raises(ValueError, match=r"'excellent' \(3 tokens\), 'bad' \(2 tokens\).*one mask"):
        prompted.check_candidates([" good", " excellent", " bad"], [(5,), (6, 7, 8), (9, 10)])
    with pytest.raises(ValueError, match="row 3 of train has 2 tokens"):
        prompted.check_row([0, 5, 1], [6, 7], "row 3 of train")


def test_masks_of_rows_are_independent(tiny_backbone: MakeBackbone) -> None:
    """One of its own, none, or two: a row is answered where it is answered alone."""
    backbone = tiny_backbone("bert_mlm")
    mask_id = backbone.tokenizer.mask_token_id
    rows = [[0, 20, mask_id, 30, 1], [0, 20, 1], [0, mask_id, 40, mask_id, 41, 1], [0, 50, 51, 52, 53, 54, 1]]
    wide = max(map(len, rows))
    for position in ("prefix", "suffix"):
        prompted = attach(backbone, Plain(length=3).build(backbone.host(), torch.Generator()), prompt_position=position)
        ids = torch.tensor([row + [2] * (wide - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (wide - len(row)) for row in rows])
        together = prompted(ids, mask).logits
        for row, logits in zip(rows, together, strict=True):
            torch.testing.assert_close(logits, prompted(torch.tensor([row])).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_end_ids_are_those_of_tokenizer_and_model(
    name: str, tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompted = attach(tiny_backbone(name))
    model = prompted.backbone.model
    monkeypatch.setattr(model.generation_config, "eos_token_id", [5, 7])
    monkeypatch.setattr(model.config, "eos_token_id", 2)  # a special token; an ordinary one is a class's default
    assert prompted.end_of_sequence() == [1, 5, 7, 2]
    monkeypatch.setattr(model.config, "eos_token_id", 9)
    assert prompted.end_of_sequence() == [1, 5, 7]
    if name == "t5":
        assert prompted.target((20, 1)) == (20, 1)
        assert prompted.target((20, 7)) == (20, 7)
        assert prompted.target((20,)) == (20, 1)
