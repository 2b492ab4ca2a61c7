"""Every export equals the live run; what a format cannot express is refused, and nothing half-written stays."""

import base64
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from softprompt import METHODS, Experiment, Run, attach, runs
from softprompt.backbones import Backbone
from softprompt.export import FORMATS, base, export_runs, read_dept, vllm
from softprompt.models import fresh_head
from softprompt.prompts.deep import build
from softprompt.tasks import Task

MakeRun = Callable[..., Run]


def test_vllm_client_tensor_equals_live_run(
    made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    """The client in the folder, run by itself, makes a tensor that plain transformers answers as the run does."""
    backbone = tiny_backbone("gpt2")
    trained = [made(backbone, "dpt"), made(backbone, "plain")]
    report = export_runs(trained, FORMATS["vllm"], tmp_path / "out", backbone=backbone)
    assert report["largest_difference"] < 1e-4
    spec = importlib.util.spec_from_file_location("client", tmp_path / "out" / "client.py")
    assert spec is not None
    assert spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    prompts = client.VllmEmbeds(tmp_path / "out")
    text = trained[0].task.render({"text": "a a b"})
    tensor = torch.load(io.BytesIO(base64.b64decode(prompts.encoded("plain", text))), weights_only=True)
    live, ids = attach(backbone), torch.tensor([[0, *backbone.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    assert tensor.shape == (5 + ids.shape[1], 32)
    with torch.no_grad():
        theirs = backbone.model(inputs_embeds=tensor[None]).logits[0, 5:]
        ours = live(ids, prompts=[trained[1].prompt(backbone)]).logits[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_vllm_differing_scores_are_dropped(
    made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: a live run that looks elsewhere."""
    backbone = tiny_backbone("llama")
    run, live = made(backbone, "plain"), attach(backbone)
    monkeypatch.setattr(vllm, "attach", lambda _: lambda row, prompts: live(row.flip(1), prompts=prompts))
    with pytest.raises(ValueError, match="the request's tensor gives other scores than the live run"):
        export_runs([run], FORMATS["vllm"], tmp_path / "out", backbone=backbone)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_trtllm_table_and_ids(made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    trained = [made(backbone, "dpt"), made(backbone, "plain")]
    export_runs(trained, FORMATS["trtllm"], tmp_path / "out", backbone=backbone)
    table, notes = (
        np.load(tmp_path / "out" / "prompt_table.npy"),
        json.loads((tmp_path / "out" / "tasks.json").read_text()),
    )
    assert (table.shape, table.dtype) == ((2, 11, 32), np.float32)
    assert (notes["vocab_size"], notes["max_prompt_embedding_table_size"]) == (300, 22)
    assert notes["tasks"]["plain"] == {"task": 1, "tokens": 5, "ids": [300, 301, 302, 303, 304]}
    assert np.array_equal(table[0], trained[0].prompt(backbone).prompt().detach().numpy())
    assert np.array_equal(table[1, :5], trained[1].prompt(backbone).prompt().detach().numpy())
    assert not table[1, 5:].any()


def test_llamacpp_rows(made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    run = made(backbone, "dpt")
    export_runs([run], FORMATS["llamacpp"], tmp_path / "out", backbone=backbone)
    header = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert (header["n_embd"], header["prompts"]) == (32, {"dpt": {"file": "dpt.f32", "n_tokens": 11}})
    assert (tmp_path / "out" / "dpt.f32").stat().st_size == 11 * 32 * 4
    rows = np.fromfile(tmp_path / "out" / "dpt.f32", "<f4").reshape(11, 32)
    assert np.array_equal(rows, run.prompt(backbone).prompt().detach().numpy())


def test_npz_holds_every_method(made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    trained = [made(backbone, method) for method in METHODS]
    export_runs(trained, FORMATS["npz"], tmp_path / "out", backbone=backbone)
    with np.load(tmp_path / "out" / "prompts.npz", allow_pickle=False) as arrays:
        tables = {key.split(".")[1] for key in arrays}
        for run in trained:
            folded = run.prompt(backbone).fold()
            names = {f"{run.name}.{key}" for key in (*folded.state_dict(), "beyond", "num_matrices")}
            assert {key for key in arrays if key.startswith(f"{run.name}.")} == names
            assert all(np.array_equal(arrays[f"{run.name}.{key}"], its) for key, its in folded.state_dict().items())
            assert (str(arrays[f"{run.name}.beyond"]), int(arrays[f"{run.name}.num_matrices"])) == (folded.beyond, 1)
    assert tables == {"matrix", "position_table", "input_table", "beyond", "num_matrices"}


def test_npz_deep_prompt_has_its_number_of_matrices(tiny_backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    backbone, config = tiny_backbone("vit"), METHODS["plain"](length=4)
    task = Task(name="pets", image="image", label="label", label_words={"cat": "cat", "dog": "dog"})
    experiment = Experiment(backbone="vit", prompt=config, depth="deep")
    run = runs.create(
        experiment, task, backbone, tmp_path / "runs", "pets", dict.fromkeys(("splits", "full", "test"), "")
    )
    prompt, head = build(config, backbone.hosts(3), torch.Generator()), fresh_head(backbone, 2, torch.Generator())
    trained = run.finish(attach(backbone, prompt, head=head), {"test": 0.5})
    export_runs([trained], FORMATS["npz"], tmp_path / "out", backbone=backbone)
    with np.load(tmp_path / "out" / "prompts.npz") as arrays:
        assert (arrays["pets.matrix"].shape, int(arrays["pets.num_matrices"])) == ((12, 32), 3)
        assert np.array_equal(arrays["pets.matrix"], prompt.prompt().detach())


def test_dept_reads_back(made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    t5 = tiny_backbone("t5")
    run = made(t5, "dept")
    export_runs([run], FORMATS["dept"], tmp_path / "out", backbone=t5)
    torch.testing.assert_close(read_dept(tmp_path / "out").prompt.prompt(), run.prompt(t5).prompt())


@pytest.mark.parametrize(
    ("kind", "method", "to", "message"),
    [
        ("llama", "dept", "vocab", r"dept also changes the input's own embeddings; export to npz"),
        ("llama", "adept", "vocab", r"adept also changes the input's own embeddings"),
        ("bert_mlm", "plain", "vocab", r"the kind encoder, .*; export to npz"),
        ("llama", "dept", "vllm", r"vLLM takes vectors before the input only"),
        ("t5", "plain", "vllm", r"vLLM takes a prompt before a decoder's text only.*; export to vocab"),
        ("t5", "plain", "trtllm", r"TensorRT-LLM takes a prompt before a decoder's text only"),
        ("gemma", "plain", "llamacpp", r"gemma scales inside its embedding.*; export to vocab"),
        ("gemma", "plain", "vllm", r"gemma scales inside its embedding"),
        ("gemma", "plain", "gguf", r"no gemma models, only llama, .*; export to vocab, and convert that"),
        ("mistral", "plain", "gguf", r"without a sliding window, which the model has"),
        ("t5", "plain", "gguf", r"llama.cpp takes a prompt before a decoder's text only"),
        ("t5", "plain", "dept", r"the run trained plain"),
        ("llama", "dept", "dept", r"llama is not one; export to npz"),
        ("llama", "adept", "peft", r"PEFT's prompt-tuning format holds vectors in front"),
    ],
)
def test_inexpressible_prompts_are_refused(
    kind: str,
    method: str,
    to: str,
    message: str,
    made: MakeRun,
    tiny_backbone: Callable[[str], Backbone],
    tmp_path: Path,
) -> None:
    backbone = tiny_backbone(kind)
    with pytest.raises(ValueError, match=message):
        export_runs([made(backbone, method)], FORMATS[to], tmp_path / "out", backbone=backbone)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_runs_that_do_not_fit_are_refused(
    made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path, llama_folder: Path
) -> None:
    llama, gpt2 = tiny_backbone("llama"), tiny_backbone("gpt2")
    one, other = made(llama, "plain"), made(gpt2, "dpt")
    with pytest.raises(ValueError, match="trained on gpt2, llama; one export holds"):
        export_runs([one, other], FORMATS["vocab"], tmp_path / "out", backbone=llama)
    half = dict(other.record) | {"backbone": {**one.record["backbone"], "dtype": "bfloat16"}}
    with pytest.raises(ValueError, match="trained on llama in bfloat16, llama in float32; one export holds"):
        export_runs([one, Run(other.folder, other.experiment, other.task, half)], FORMATS["vocab"], tmp_path / "out")
    with pytest.raises(ValueError, match="two runs are named 'plain'"):
        export_runs([one, one], FORMATS["vocab"], tmp_path / "out", backbone=llama)
    with pytest.raises(ValueError, match="peft holds one prompt, but 2 runs are given"):
        export_runs([one, one], FORMATS["peft"], tmp_path / "out", backbone=llama)
    with pytest.raises(ValueError, match="token_names names 'x'"):
        export_runs([one], FORMATS["vocab"], tmp_path / "out", backbone=llama, token_names={"x": "<y>"})
    with pytest.raises(ValueError, match="'two words'; give it one such as <plain>"):
        export_runs([one], FORMATS["vocab"], tmp_path / "out", backbone=llama, token_names={"plain": "two words"})
    with pytest.raises(ValueError, match="npz has no token names"):
        export_runs([one], FORMATS["npz"], tmp_path / "out", backbone=llama, token_names={"plain": "<y>"})
    with pytest.raises(ValueError, match=r"the weights of .* are not those"):
        export_runs([one], FORMATS["npz"], tmp_path / "out", backbone=gpt2)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="never overwritten"):
        export_runs([one], FORMATS["npz"], tmp_path / "there", backbone=llama)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "there"]


def test_an_embedding_that_does_more_than_scale(tiny_backbone: Callable[[str], Backbone]) -> None:
    assert base.embedding_scale(tiny_backbone("llama")) == 1.0
    assert base.embedding_scale(tiny_backbone("gemma")) == pytest.approx(32**0.5, rel=1e-3)
    own = tiny_backbone("llama")
    handle = own.model.get_input_embeddings().register_forward_hook(lambda *given: given[2].tanh())
    try:
        assert base.embedding_scale(own) is None
    finally:
        handle.remove()
