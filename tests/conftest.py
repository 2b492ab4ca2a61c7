"""Shared fixtures: tiny random models of real architectures, a real tokenizer, a model folder and a task folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import csv
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from softprompt.backbones import Backbone
from softprompt.backbones.image_processor import processor_from_settings

torch.set_num_threads(1)

LABELS = ("Billing", "Sales", "Returns", "Login", "Delivery", "Other")
"""The labels of `ticket_task`; the texts of each repeat one letter."""
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT: dict[str, Any] = {"vocab_size": 300, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "gpt2": lambda: transformers.GPT2Config(**GPT, n_embd=32, n_positions=256),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "opt": lambda: transformers.OPTConfig(**{**SIZES, "ffn_dim": 64}, word_embed_proj_dim=16),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=128),
    "bloom": lambda: transformers.BloomConfig(**GPT, hidden_size=32),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=128),
}
"""Nine decoders: rotary, learned and ALiBi positions, grouped heads, windows, scaled or projected embeddings."""
T5: dict[str, Any] = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
T5_IDS: dict[str, Any] = {"decoder_start_token_id": 2, "eos_token_id": 1, "pad_token_id": 2}
BART: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "forced_eos_token_id": None,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
}
ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5Config(**T5, **T5_IDS),
    "t5_1.1": lambda: transformers.T5Config(**T5, **T5_IDS, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": lambda: transformers.MT5Config(**T5, **T5_IDS),
    "bart": lambda: transformers.BartConfig(**BART, decoder_start_token_id=1, scale_embedding=True),
    "bart_forced": lambda: transformers.BartConfig(**BART, decoder_start_token_id=1),
    "marian": lambda: transformers.MarianConfig(**BART, decoder_start_token_id=2, scale_embedding=False),
}
"""Relative, learned and sinusoidal positions; tied and untied heads; a forced first token; scaled embeddings."""
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.RobertaConfig(**SIZES),
    "mpnet": lambda: transformers.MPNetConfig(**SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=300, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=256, pad_token_id=2
    ),
}
"""Each as `bert`, which answers through a trained head, and as `bert_mlm`, which answers in words."""

PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
VISION: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTConfig(**PATCHES),
    "deit": lambda: transformers.DeiTConfig(**PATCHES),
    "dinov2": lambda: transformers.Dinov2Config(**PATCHES, mlp_ratio=2),
    "dinov2_registers": lambda: transformers.Dinov2WithRegistersConfig(**PATCHES, mlp_ratio=2, num_register_tokens=2),
}
"""[CLS] alone, with a distillation token, and with registers."""


def _tokenizer(template: str = "<s> $A") -> Any:
    """A byte-level BPE of 300 tokens: it encodes any text, and label words have one or several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"] + (["<mask>"] if template != "<s> $A" else []),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"Ticket: a a b b c c\nQueue: {label.lower()}" for label in LABELS] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"} if template != "<s> $A" else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **special
    )


@torch.no_grad()
def _model(config: Any, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32).eval()
    # With the initial weights attention is nearly uniform, and a wrong position would hardly change the output.
    for weights in model.parameters():
        if weights.ndim == 2:
            weights *= 5
    return model


@pytest.fixture(autouse=True)
def _separate_cache(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep tests from the user's cache, except those of a downloaded asset."""
    if request.node.get_closest_marker("asset") is None:
        monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return _tokenizer()


@pytest.fixture(scope="session")
def tiny_backbone(tokenizer: Any) -> Callable[[str], Backbone]:
    """`tiny_backbone("llama")`: one of DECODERS, ENCODER_DECODERS, ENCODERS or VISION, float32, cached per session."""
    cache: dict[str, Backbone] = {}
    with_eos, with_mask = _tokenizer("$A </s>"), _tokenizer("<s> $A </s>")

    def build(name: str) -> Backbone:
        if name in DECODERS:
            return Backbone(_model(DECODERS[name]()), tokenizer, name, name, "causal")
        if name in ENCODER_DECODERS:
            model = _model(ENCODER_DECODERS[name](), transformers.AutoModelForSeq2SeqLM)
            model.generation_config.forced_bos_token_id = 0 if name == "bart_forced" else None
            return Backbone(model, with_eos, name, name, "encoder_decoder")
        if name in VISION:
            model = _model(VISION[name](), transformers.AutoModel)
            return Backbone(model, processor_from_settings({}, model.config), name, name, "vision")
        kind = transformers.AutoModelForMaskedLM if name.endswith("_mlm") else transformers.AutoModel
        return Backbone(_model(ENCODERS[name.removesuffix("_mlm")](), kind), with_mask, name, name, "encoder")

    def make(name: str) -> Backbone:
        if name not in cache:
            cache[name] = build(name)
        return cache[name]

    return make


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, tiny_backbone: Callable[[str], Backbone]) -> Backbone:
    """Each of the nine decoders."""
    return tiny_backbone(request.param)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A saved tiny Llama with its tokenizer; read-only."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny-llama"
    _model(DECODERS["llama"]()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""The ChatML layout in the control tokens of the tests' tokenizer."""


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """`llama_folder` with a chat template; read-only."""
    folder = tmp_path_factory.mktemp("chat") / "tiny-chat"
    shutil.copytree(llama_folder, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="session")
def ticket_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's task of six classes: a TOML file next to a CSV of 120 rows; read-only."""
    folder = tmp_path_factory.mktemp("task")
    draw = random.Random(0)
    with (folder / "train.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "queue"])
        for number in range(120):
            letter = "abcdef"[number % 6]
            table.writerow([" ".join([letter] * draw.randint(2, 8)), LABELS[number % 6]])
    file = folder / "tickets.toml"
    file.write_text('train = "train.csv"\ntemplate = "Ticket: {text}\\nQueue:"\nlabel = "queue"\n')
    return file


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Disable the tests' shape checker, so that our own error is raised, as for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
