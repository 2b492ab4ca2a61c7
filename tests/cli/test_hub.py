"""`push`, and `hub:USER/NAME` where a folder can be given, through huggingface_hub's client and a local hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import TOKEN, FakeHub
from huggingface_hub import ModelCard
from local_lm_eval import write_local_task
from safetensors.torch import load

import softprompt
from softprompt.assets.hub import local_folder
from softprompt.cli import main
from softprompt.export.hub import model_card


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, ticket_task: Path) -> softprompt.Run:
    experiment = softprompt.Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=softprompt.DPT(rank=2, length=4),
        training=softprompt.TrainingConfig(steps=2, batch_size=4, eval_steps=2),
        dtype="float32",
    )
    return softprompt.train(experiment, out=tmp_path_factory.mktemp("runs"), name="tickets")


def commands(hub: FakeHub, cache: Path, *arguments: list[Any], token: str = TOKEN) -> list[Any]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
        "HF_HOME": str(cache / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "SOFTPROMPT_CACHE": str(cache / "softprompt"),
    }
    script = Path(__file__).with_name("hub_commands.py")
    texts = json.dumps([[str(argument) for argument in one] for one in arguments])
    done = subprocess.run([sys.executable, script, texts], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_pushed_prompt_is_used_by_name(
    run: softprompt.Run, hub: FakeHub, tmp_path: Path, llama_folder: Path, ticket_task: Path
) -> None:
    hub.commit("me/run", {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()})
    name, out = "me/tickets", tmp_path / "runs"
    train = ["train", "--backbone", llama_folder, "--task", ticket_task, "--out", out, "--steps", "1"]
    train += ["--batch-size", "4", "--dtype", "float32", "--eval-steps", "1"]
    rows = tmp_path / "rows.csv"
    rows.write_text("text\na a\nb\n")
    pushed, again, as_peft, evaluated, predicted, unnamed, exported, started, served, _, cached, missing, push_down = (
        commands(
            hub,
            tmp_path / "cache",
            ["push", run.folder, name, "--private", "--base-model", "me/tiny-llama", "--datasets", "me/data"],
            ["push", run.folder, name, "--base-model", "me/tiny-llama"],
            ["evaluate", f"hub:{name}", "--task", ticket_task, "--backbone", llama_folder],
            ["evaluate", "hub:me/run"],
            ["predict", "hub:me/run", "--input", rows],
            ["export", "hub:me/run"],
            ["export", "hub:me/run", "--to", "npz", "--output", tmp_path / "npz"],
            [*train, "--name", "hub", "--init-prompt", f"hub:{name}", "dpt", "--rank", "2", "--length", "4"],
            ["folders", f"hub:{name}", "other=hub:me/run"],
            ["hub goes down"],
            ["evaluate", "hub:me/run"],
            ["evaluate", "hub:me/other"],
            ["push", run.folder, name, "--base-model", "me/tiny-llama"],
        )
    )
    assert pushed["said"]["url"].startswith(f"{hub.address}/{name}/commit/"), pushed
    assert again["status"] == 0
    assert hub.private == {name}
    first, second = list(hub.repos[name].values())[1:]
    # No rows, predictions or paths of this machine.
    assert set(first) - {".gitattributes"} <= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "curve.png",
    }
    assert not [file for file, content in first.items() if str(llama_folder).encode() in content]
    assert json.loads(first["adapter_config.json"])["base_model_name_or_path"] == "me/tiny-llama"
    assert first["adapter_model.safetensors"] == (run.folder / "adapter_model.safetensors").read_bytes()
    card = ModelCard(first["README.md"].decode())
    assert card.data.datasets == ["me/data"]
    assert evaluated["said"]["value"] == pytest.approx(softprompt.evaluate(run).value)
    assert as_peft["said"]["value"] == pytest.approx(evaluated["said"]["value"]), as_peft
    assert predicted["said"]["row"] == 2  # the last row
    assert unnamed["status"] == 1
    assert "give --output" in unnamed["error"]
    assert exported["said"]["output"] == str(tmp_path / "npz")
    assert started["status"] == 0, started["error"]
    assert (
        main(
            [str(part) for part in [*train, "--name", "folder", "--init-prompt", run.folder]]
            + ["dpt", "--rank", "2", "--length", "4"]
        )
        == 0
    )
    trained = [load((out / name / "adapter_model.safetensors").read_bytes()) for name in ("hub", "folder")]
    torch.testing.assert_close(*trained)
    assert [entry[0] for entry in served["folders"]] == ["tickets", "other"]
    assert Path(served["folders"][0][1], "adapter_model.safetensors").read_bytes() == first["adapter_model.safetensors"]
    assert cached["said"] == evaluated["said"]
    assert missing["status"] == push_down["status"] == 1
    assert f"hub:me/other is not in the local cache, and {hub.address} cannot be reached" in missing["error"]
    assert f"{hub.address} cannot be reached, so nothing was uploaded" in push_down["error"]
    assert second["README.md"] != first["README.md"]


def test_rank_sweep_and_lm_eval_take_a_name(
    run: softprompt.Run, hub: FakeHub, tmp_path: Path, llama_folder: Path, ticket_task: Path
) -> None:
    files = {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    hub.commit("me/run", files)
    hub.commit("me/peft", {name: files[name] for name in ("adapter_config.json", "adapter_model.safetensors")})
    sweep = [f'backbone = "{llama_folder}"', f'task = "{ticket_task}"', 'dtype = "float32"']
    sweep += ['init_prompt = "hub:me/run"', "[training]", "steps = 1", "batch_size = 4", "eval_steps = 1"]
    sweep += ["[[method]]", 'name = "dpt"', "rank = 2", "length = 4"]
    (tmp_path / "sweep.toml").write_text("\n".join(sweep))
    tasks = write_local_task(tmp_path / "tasks", ["billing", "sales"], [{"text": "a a", "answer": 0}])
    lm_eval = ["--tasks", "local_tickets", "--include-path", tasks]
    rank, rank_peft, gradient, swept, scored, scored_peft = commands(
        hub,
        tmp_path / "cache",
        ["rank", "hub:me/run"],
        ["rank", "hub:me/peft"],
        ["rank", "hub:me/run", "--gradient", "--batches", "1"],
        ["sweep", tmp_path / "sweep.toml", "--out", tmp_path / "runs"],
        ["lm-eval", "hub:me/run", *lm_eval],
        ["lm-eval", "hub:me/peft", "--backbone", llama_folder, *lm_eval],
    )
    assert [one["status"] for one in (rank, rank_peft, gradient, swept, scored, scored_peft)] == [0] * 6, (
        rank["error"] + gradient["error"] + swept["error"] + scored["error"] + scored_peft["error"]
    )
    assert rank["said"]["prompts"][0]["name"] == "run"
    assert rank_peft["said"]["prompts"][0]["name"] == "peft"
    assert scored["said"]["results"] == scored_peft["said"]["results"]
    [folder] = [path for path in (tmp_path / "runs").iterdir() if (path / "softprompt.json").is_file()]
    assert softprompt.open_run(folder).experiment.init_prompt == "hub:me/run"


def test_revision_and_missing_names_are_told_apart(run: softprompt.Run, hub: FakeHub, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    old, _ = hub.commit("me/run", files), hub.commit("me/run", {"adapter_config.json": b"{}"})
    hub.commit("me/secret", files)
    hub.private.add("me/secret")
    hub.commit("me/model", {"model.safetensors": b"x"})
    push = ["push", run.folder, "me/new", "--base-model", "me/tiny-llama"]
    *found, revision, nobody, secret, model, malformed, refused = commands(
        hub,
        tmp_path / "cache",
        ["folders", "hub:me/run"],
        ["folders", f"hub:me/run@{old}"],
        ["evaluate", "hub:me/run@none"],
        ["evaluate", "hub:me/nobody"],
        ["evaluate", "hub:me/secret"],
        ["evaluate", "hub:me/model"],
        ["evaluate", "hub:me/a b"],
        push,
        token="hf_other",
    )
    configs = [Path(one["folders"][0][1], "adapter_config.json").read_bytes() for one in found]
    assert configs == [b"{}", files["adapter_config.json"]]
    assert [Path(one["folders"][0][1]).name for one in found] == ["run", "run"]
    assert "me/run has no revision 'none'" in revision["error"]
    for one, name in ((nobody, "me/nobody"), (secret, "me/secret")):
        assert f"the Hub has no prompt {name}, or shows it only with a token" in one["error"]
    assert "holds neither a PEFT prompt nor a run" in model["error"]
    assert "hub:me/a b is not the name of a prompt on the Hub" in malformed["error"]
    assert "the hub refuses the upload to me/new (401)" in refused["error"]
    assert {one["status"] for one in (revision, nobody, secret, model, malformed, refused)} == {1}


def test_offline_is_refused_in_one_sentence(run: softprompt.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run.folder), "me/x", "--base-model", "me/llama"]) == 1
    assert "HF_HUB_OFFLINE is set, so nothing can be uploaded" in capsys.readouterr().err
    assert main(["evaluate", "hub:me/x"]) == 1
    assert "hub:me/x is not in the local cache, and HF_HUB_OFFLINE is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["me/x"], "give --base-model the Hub id of these weights"),
        (["not a name", "--base-model", "me/llama"], "the name is 'not a name', which is not an id on the Hub"),
        (["me/x", "--base-model", "me llama"], "the base model is 'me llama', which is not an id on the Hub"),
        (["me/x", "--base-model", "me/llama", "--datasets", "my data"], "a data set is 'my data', which is not an id"),
    ],
)
def test_names_are_checked_before_the_hub(
    run: softprompt.Run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run.folder), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_card_has_the_test_score_as_model_index(run: softprompt.Run) -> None:
    card = ModelCard(str(model_card(run, "me/tiny-llama")))
    assert run.results is not None
    assert (card.data.base_model, card.data.library_name) == ("me/tiny-llama", "peft")
    assert card.data.pipeline_tag == "text-classification"
    assert {"softprompt", "prompt-tuning", "dpt"} <= set(card.data.tags)
    [result] = [one for one in card.data.eval_results if one.metric_type == run.results["metric"]]
    assert result.metric_value == pytest.approx(run.results["test"], abs=1e-6)
    assert (result.dataset_name, result.dataset_split) == (run.task.name, "test")
    assert card.text.strip().startswith(f"# {run.name}")
    assert str(run.experiment.backbone) not in card.text


def test_a_folder_stays_as_it_is(tmp_path: Path) -> None:
    assert local_folder(tmp_path / "hub") == tmp_path / "hub"
