"""A checkpoint whose vocabulary has the prompts equals the live runs, and never generates a prompt's token."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import copy_of
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from softprompt import PromptedModel, Run, attach, load_backbone, runs
from softprompt.backbones import Backbone
from softprompt.export import FORMATS, export_runs
from softprompt.export.vocab import Vocab
from softprompt.tasks import Task
from softprompt.tasks.data.tokenize import answer_ids, encode

DECODERS = ["llama", "gpt2", "gpt_neox", "opt", "gemma", "bloom"]
SEQ2SEQ = ["t5", "t5_1.1", "mt5", "bart", "bart_forced"]
UNSCALED = ("t5", "t5_1.1", "mt5")
"""Their attention's scores, and the latter two's last states, are not scaled, so that float32 may lose any number of
digits in one row: they are compared in float64 (an answer's score is float32 even so)."""
METHODS = ("plain", "dpt", "residual")
"""Of three lengths."""
ROWS = [{"text": text} for text in ("a a b", "c", "b b b a c c a", "a", "c b a c", "b")]
MakeRun = Callable[..., Run]


def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        ids.append([2] * gap + list(row) if side == "left" else list(row) + [2] * gap)
        mask.append([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)
    return torch.tensor(ids), torch.tensor(mask)


def laid_out(
    folder: Path, live: PromptedModel, task: Task, names: Sequence[str]
) -> tuple[list[list[int]], torch.Tensor, Any]:
    """Rows of plain ids, the prompts mixed; and what the live run is given for the same."""
    usage = json.loads((folder / "prompts.json").read_text())
    texts = [
        row.input_ids
        for row in encode(task, live.backbone.tokenizer, ROWS, 64, appends_eos=live.appends_eos, answers=False)[0]
    ]
    index = torch.tensor([number % len(names) for number in range(len(texts))])
    ids = [[*usage["prompts"][names[which]]["ids"], *text] for which, text in zip(index.tolist(), texts, strict=True)]
    return ids, index, padded(texts, "left")


@pytest.mark.parametrize("kind", DECODERS + SEQ2SEQ)
def test_checkpoint_equals_live_runs(
    kind: str, made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    backbone = tiny_backbone(kind)
    before, config = backbone.checksum(), backbone.model.config.to_dict()
    trained = [made(backbone, method) for method in METHODS]
    folder = tmp_path / "checkpoint"
    report = export_runs(trained, FORMATS["vocab"], folder, backbone=backbone)
    assert report["prompts"] == {run.name: run.experiment.prompt.length for run in trained}
    assert (backbone.checksum(), backbone.model.config.to_dict()) == (before, config), "the backbone is not touched"

    dtype = "float64" if kind in UNSCALED else "float32"
    live = attach(copy_of(backbone, getattr(torch, dtype)))
    prompts = [run.prompt(backbone).fold() for run in trained]
    rows, index, (ids, mask) = laid_out(folder, live, trained[0].task, METHODS)
    decoder = backbone.architecture == "causal"
    plain = (AutoModelForCausalLM if decoder else AutoModelForSeq2SeqLM).from_pretrained(folder, dtype=dtype).eval()
    given, given_mask = padded(rows, "left" if decoder else "right")
    with torch.no_grad():
        wanted = torch.stack(list(live.generate(ids, mask, max_new_tokens=7, prompts=prompts, index=index, stop=[])), 1)
        found = plain.generate(
            input_ids=given, attention_mask=given_mask, max_new_tokens=7, do_sample=False, eos_token_id=[-1]
        )
        assert torch.equal(found[:, given.shape[1] if decoder else 1 :], wanted)
        candidates = [live.target(word) for word in answer_ids(trained[0].task, backbone.tokenizer)]
        scores = live.score(ids, mask, candidates, prompts=prompts, index=index)
        suppressed = json.loads((folder / "prompts.json").read_text())["suppressed_ids"]
        for row, its in enumerate(rows):
            theirs, size = zip(*(scored(plain, its, word, suppressed, decoder) for word in candidates), strict=True)
            # float32 sums in another order: relative to the largest logit, whose rounding the scores inherit
            torch.testing.assert_close(torch.tensor(theirs), scores[row], rtol=0, atol=1e-5 * max(1.0, *size))


def scored(
    model: Any, row: Sequence[int], answer: Sequence[int], suppressed: Sequence[int], decoder: bool
) -> tuple[float, float]:
    """Log-probability of `answer` behind a row of plain ids, the new ids left out as when suppressed; largest logit."""
    if decoder:
        logits = model(input_ids=torch.tensor([[*row, *answer]])).logits[0, len(row) - 1 : -1]
    else:
        logits = model(input_ids=torch.tensor([row]), labels=torch.tensor([answer])).logits[0]
    size = float(logits[:, : suppressed[0]].abs().max())
    logits[:, suppressed] = -torch.inf
    logp = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
    return float(logp[model.generation_config.forced_bos_token_id is not None :].sum()), size


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_prompt_tokens_are_never_generated(
    kind: str, made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    """Greedy, by beams, and sampled hot for many tokens; without the suppression, they are said."""
    backbone = tiny_backbone(kind)
    export_runs([made(backbone, "dpt"), made(backbone, "plain")], FORMATS["vocab"], tmp_path / "out", backbone=backbone)
    decoder = backbone.architecture == "causal"
    model = (AutoModelForCausalLM if decoder else AutoModelForSeq2SeqLM).from_pretrained(tmp_path / "out")
    usage = json.loads((tmp_path / "out" / "prompts.json").read_text())
    ids = torch.tensor([[*usage["prompts"]["dpt"]["ids"], 5, 6, 7]] * 8)

    def said(**how: Any) -> set[int]:
        torch.manual_seed(0)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=[-1], **how)
        return set(out[:, ids.shape[1] if decoder else 1 :].flatten().tolist())

    hot = {"do_sample": True, "temperature": 50.0, "top_k": 0, "max_new_tokens": 60}
    for how in ({"max_new_tokens": 20}, {"num_beams": 3, "max_new_tokens": 10}, hot):
        assert not said(**how) & set(usage["suppressed_ids"]), how
    model.generation_config.suppress_tokens = None
    assert said(**hot) & set(usage["suppressed_ids"]), "hot enough to say anything"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "gemma"])
def test_head_keeps_its_rows(
    kind: str, made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    """Tied or not: old rows keep their bits, each new row is one of the old, and the embedding's are the prompt's."""
    backbone = tiny_backbone(kind)
    export_runs([made(backbone, "plain")], FORMATS["vocab"], tmp_path / "out", backbone=backbone)
    loaded = type(backbone.model).from_pretrained(tmp_path / "out", dtype="float32")
    head, was = loaded.get_output_embeddings().weight, backbone.model.get_output_embeddings().weight
    assert torch.equal(head[: len(was)], was)
    assert len(head) == len(loaded.get_input_embeddings().weight) == len(was) + 5
    assert len(head[len(was) :].unique(dim=0)) == 1
    assert (head[: len(was)] == head[-1]).all(1).any()
    assert loaded.get_input_embeddings().weight is not head


def test_head_bias_silences_new_tokens(made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    bart, llama = tiny_backbone("bart"), tiny_backbone("llama")
    report = export_runs([made(bart, "plain")], FORMATS["vocab"], tmp_path / "out", backbone=bart)
    assert report["unsuppressed_probability"] == 0
    report = export_runs([made(llama, "plain", "other")], FORMATS["vocab"], tmp_path / "other", backbone=llama)
    assert 0 < report["unsuppressed_probability"] < 5 / 300, "less than as many tokens of average probability"


@pytest.mark.parametrize(("kind", "special"), [("llama", False), ("gpt2", False), ("t5", True)])
def test_text_gives_the_runs_ids(
    kind: str, special: bool, made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    """What prompts.json says to put before the text gives the run's ids, beginning of sequence behind the prompt."""
    backbone = tiny_backbone(kind)
    token_names = {"plain": "<ticket>"}
    run = made(backbone, "plain")
    export_runs([run], FORMATS["vocab"], tmp_path / "out", backbone=backbone, token_names=token_names)
    usage, tokenizer = (
        json.loads((tmp_path / "out" / "prompts.json").read_text()),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert usage["as_text"]["add_special_tokens"] == special
    entry = usage["prompts"]["plain"]
    assert entry["text"].startswith("<ticket-0><ticket-1>")
    text = run.task.render(ROWS[2])
    made_ids = tokenizer(entry["text"] + text, add_special_tokens=special)["input_ids"]
    live = encode(run.task, backbone.tokenizer, ROWS[2:3], 64, appends_eos=special, answers=False)[0][0].input_ids
    assert made_ids == [*entry["ids"], *live]
    assert tokenizer.decode(made_ids, skip_special_tokens=True) == text
    answers = zip(run.task.label_words, map(list, answer_ids(run.task, tokenizer)), strict=True)
    assert entry["answers"] == dict(answers)


def test_padding_rows_of_the_table_stay_unused(
    made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    """A table of more rows than the tokenizer has tokens: prompts stand behind it, and scores do not move."""
    own = tiny_backbone("llama")
    torch.manual_seed(0)
    config = type(own.model.config)(**{**own.model.config.to_dict(), "vocab_size": 320})
    backbone = Backbone(AutoModelForCausalLM.from_config(config), own.tokenizer, "padded", "padded", "causal")
    report = export_runs([made(backbone, "dpt")], FORMATS["vocab"], tmp_path / "out", backbone=backbone)
    assert report["largest_difference"] < 1e-4
    usage = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert usage["prompts"]["dpt"]["ids"] == list(range(320, 331)) == usage["suppressed_ids"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<prompt-dpt-0>") == 320


def test_bfloat16_backbone_gives_bfloat16_checkpoint(
    made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    own = tiny_backbone("gemma")
    model = AutoModelForCausalLM.from_config(own.model.config, dtype=torch.bfloat16)
    backbone = Backbone(model, own.tokenizer, "half", "half", "causal")
    export_runs([made(backbone, "dpt")], FORMATS["vocab"], tmp_path / "out", backbone=backbone)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype is torch.bfloat16


def test_differing_checkpoint_is_dropped(
    made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault in the table, and one in the rest of the model: each is found, and nothing stays."""
    backbone = tiny_backbone("llama")
    run, loaded = made(backbone, "dpt"), Vocab.write

    def spoilt(name: str, position: int) -> Callable[..., None]:
        def write(self: Vocab, trained: Any, backbone: Backbone, folder: Path) -> None:
            loaded(self, trained, backbone, folder)
            model = AutoModelForCausalLM.from_pretrained(folder)
            model.get_parameter(name).data[position] += 0.5
            model.save_pretrained(folder)

        return write

    for name, position, message in (
        ("model.embed_tokens.weight", -1, "the embedding of dpt differs"),
        ("model.norm.weight", 3, "other scores than the live run"),
    ):
        monkeypatch.setattr(Vocab, "write", spoilt(name, position))
        with pytest.raises(ValueError, match=message):
            export_runs([run], FORMATS["vocab"], tmp_path / "out", backbone=backbone)
        assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_taken_token_name_is_refused(made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    own = tiny_backbone("llama")
    tokenizer = AutoTokenizer.from_pretrained(saved(own.tokenizer, tmp_path / "runs"))
    tokenizer.add_tokens(["<x-0>"])
    backbone = Backbone(own.model, tokenizer, "llama", "llama", "causal")
    with pytest.raises(ValueError, match=r"the token name is taken.*--token-names"):
        export_runs(
            [made(backbone, "plain")],
            FORMATS["vocab"],
            tmp_path / "out",
            backbone=backbone,
            token_names={"plain": "<x>"},
        )
    assert not (tmp_path / "out").exists()


def test_invalid_generation_config_is_kept(llama_folder: Path, made: MakeRun, tmp_path: Path) -> None:
    """As Llama 2 was published: a temperature without sampling, and tokens that are suppressed already."""
    shutil.copytree(llama_folder, tmp_path / "runs" / "model")
    settings = {"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "suppress_tokens": [7]}
    (tmp_path / "runs" / "model" / "generation_config.json").write_text(json.dumps(settings))
    backbone = load_backbone(str(tmp_path / "runs" / "model"), dtype="float32")
    export_runs([made(backbone, "plain")], FORMATS["vocab"], tmp_path / "out", backbone=backbone)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["suppress_tokens"] == [7, *range(300, 305)]
    assert (written["temperature"], written["top_p"]) == (0.6, 0.9)


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_backbone_loaded_by_name(llama_folder: Path, made: MakeRun, tmp_path: Path) -> None:
    run = made(load_backbone(str(llama_folder), dtype="float32"), "dpt")
    record = json.loads((run.folder / "softprompt.json").read_text())
    record["experiment"]["dtype"] = "float32"
    (run.folder / "softprompt.json").write_text(json.dumps(record))
    report = export_runs([runs.open_run(run.folder)], FORMATS["vocab"], tmp_path / "out")
    assert report["prompts"] == {"dpt": 11}
