"""`softprompt rank` as a user types it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from called import call
from safetensors.torch import load_file, save_file

from softprompt.analysis.rank import plots

QUICK = ["--dtype", "float32", "--steps", "4", "--batch-size", "8", "--eval-steps", "2"]


@pytest.fixture(scope="module")
def folder(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of DPT, a baseline, a run that was never finished, and two damaged ones."""
    out = tmp_path_factory.mktemp("runs")
    where = ["--backbone", llama_folder, "--task", ticket_task, "--out", out, *QUICK]
    for seed in ("0", "1"):
        assert (
            call("train", *where, "--seed", seed, "dpt", "--anchor", "none", "--length", "6", "--rank", "2").code == 0
        )
    assert call("train", *where, "--baseline", "full", "--name", "whole").code == 0
    shutil.copytree(out / "tickets-dpt-0", out / "stopped")
    record = json.loads((out / "stopped" / "softprompt.json").read_text())
    (out / "stopped" / "softprompt.json").write_text(json.dumps({**record, "results": None}))
    for name in ("bare", "torn"):
        shutil.copytree(out / "tickets-dpt-0", out / name)
    (out / "bare" / "softprompt.safetensors").unlink()
    (out / "torn" / "softprompt.json").write_text(json.dumps(record)[:-40])
    return out


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "tickets-dpt-0"


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    """What stock PEFT would leave: two files, and no word of a task."""
    place = tmp_path / "adapter"
    place.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, place)
    return place


def test_rank_of_a_run(run: Path) -> None:
    called = call("rank", run)
    assert called.result.keys() == {"command", "source", "prompts"}
    [prompt] = called.result["prompts"]
    assert (prompt["name"], prompt["length"], prompt["dim"]) == ("tickets-dpt-0", 6, 32)
    assert prompt["ranks"].keys() == {"prompt", "centered", "update"}
    assert prompt["ranks"]["prompt"]["numerical"] == 2
    assert len(prompt["ranks"]["prompt"]["values"]) == 6
    assert 1 <= prompt["ranks"]["prompt"]["stable"] <= prompt["ranks"]["prompt"]["effective"] <= 2.001
    assert "history" not in prompt
    assert "functional" not in prompt
    assert not list(run.glob("*.svg"))


def test_rank_over_checkpoints(run: Path) -> None:
    [prompt] = call("rank", run, "--checkpoints").result["prompts"]
    assert [at["step"] for at in prompt["history"]] == [0, 2, 4]
    assert prompt["history"][0]["update"] == {"numerical": 0, "stable": 0.0, "effective": 0.0}
    assert all(at["prompt"]["numerical"] == 2 for at in prompt["history"])


def test_rank_with_all_plots(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranks"
    called = call("rank", run, "--checkpoints", "--suggest", "--split", "train", "--rows", "0", "--out", out)
    result = called.result
    stems = {"singular_values", "ranks_over_training", "score_by_rank"}
    wanted = {out / f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert {Path(path) for path in result["pictures"]} == wanted
    assert all(path.stat().st_size > 2000 for path in wanted)
    assert set(out.iterdir()) == wanted | {out / "rank.json"}
    assert json.loads((out / "rank.json").read_text()) == result
    [prompt] = result["prompts"]
    found = prompt["functional"]
    assert [cut["rank"] for cut in found["truncations"]] == [1, 2]
    assert found["truncations"][-1]["score"] == found["full"]["value"]
    evaluated = call("evaluate", run, "--split", "train").result
    assert found["full"] == {name: evaluated[name] for name in found["full"]}
    [suggestion] = result["suggestions"]
    assert suggestion["evidence"].keys() == {"tickets-dpt-0"}
    assert suggestion["sentence"] in " ".join(called.err.split())


def test_values_are_saved_before_a_plot_fails(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("this cannot be drawn")

    monkeypatch.setattr("softprompt.cli.rank.draw_ranks", fail)
    assert "this cannot be drawn" in call("rank", run, "--out", tmp_path).sentence
    assert json.loads((tmp_path / "rank.json").read_text())["prompts"]


def test_names_are_no_formulas_in_plots(run: Path, tmp_path: Path) -> None:
    """Nor are they left out of a legend for the underscore."""
    shutil.copytree(run, tmp_path / "_a$_$%")
    [png, svg] = call("rank", tmp_path / "_a$_$%", "--out", tmp_path / "out").result["pictures"]
    assert Path(png).stat().st_size
    assert "_a$_$%" in Path(svg).read_text()


def test_rank_of_a_folder_of_runs(folder: Path) -> None:
    called = call("rank", folder, "--functional", "--rows", "12", "--ranks", "1", "2")
    prompts = called.result["prompts"]
    assert [prompt["name"] for prompt in prompts] == ["tickets-dpt-0", "tickets-dpt-1"]
    assert all(prompt["functional"]["full"]["n"] == 12 for prompt in prompts)
    assert all([cut["rank"] for cut in prompt["functional"]["truncations"]] == [1, 2] for prompt in prompts)
    said = " ".join(called.err.split())
    assert "whole is the baseline full and has no prompt and is left out" in said
    assert "stopped is not finished and is left out" in said
    assert "bare lacks softprompt.safetensors, the trained tensors, and is damaged and is left out" in said
    assert "torn is left out: " in said
    assert "is not readable as JSON" in said
    assert said.count("loading ") == 1


def test_rank_of_a_peft_folder(run: Path, adapter: Path, ticket_task: Path, llama_folder: Path) -> None:
    [prompt], [same] = call("rank", adapter).result["prompts"], call("rank", run).result["prompts"]
    assert prompt["ranks"].keys() == {"prompt", "centered"}
    assert prompt["ranks"]["prompt"] == same["ranks"]["prompt"]
    assert "does not record the initial prompt P0, so its update is not measured" in prompt["note"]
    where = ["--functional", "--task", ticket_task, "--split", "train", "--rows", "0"]
    [scored] = call("rank", adapter, *where, "--backbone", llama_folder).result["prompts"]
    full, evaluated = scored["functional"]["full"], call("evaluate", run, "--split", "train").result
    assert full == {name: evaluated[name] for name in full}
    assert call("rank", adapter, *where).result["prompts"] == [scored]  # the base model is in its config
    assert "(a PEFT folder does not record it)" in call("rank", adapter, *where, "--part", "update").sentence


def test_rank_of_an_adapter_with_more_tensors(adapter: Path, ticket_task: Path) -> None:
    more = {"prompt_embeddings": torch.randn(5, 32), "prompt_encoder.lora_embedding_A": torch.zeros(9, 2)}
    save_file(more, adapter / "adapter_model.safetensors")
    [prompt] = call("rank", adapter).result["prompts"]
    assert prompt["ranks"]["prompt"]["numerical"] == 5
    assert "prompt_encoder.lora_embedding_A are ignored: only the matrix is measured" in prompt["note"]
    assert "holds more than a prompt's matrix" in call("rank", adapter, "--functional", "--task", ticket_task).sentence


def test_burstiness_of_a_run_and_its_backbone(run: Path, llama_folder: Path, tmp_path: Path) -> None:
    result = call("rank", run, "--burstiness", "--samples", "200", "--out", tmp_path).result
    found = result["burstiness"]
    assert found.keys() == {"inputs", "products", "heads", "query", "key"}
    assert len(found["heads"]) == 4
    assert {Path(path).name for path in result["pictures"]} == {"burstiness.png", "burstiness.svg"}
    assert all(Path(path).stat().st_size > 2000 for path in result["pictures"])
    assert len(json.loads((tmp_path / "rank.json").read_text())["burstiness"]["products"]["before"]["density"]) == 120
    assert "density" not in found["products"]["before"]
    bare = call("rank", llama_folder, "--burstiness", "--samples", "200").result
    assert bare["burstiness"]["inputs"]["before"]["count"] == 200 * 32
    assert bare["burstiness"]["products"]["before"]["kurtosis"] == pytest.approx(
        found["products"]["before"]["kurtosis"],
        rel=0.01,  # the run's backbone is in float32, this one as measured
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--ranks", "7", "--functional"], "rank 7 cannot be tried on tickets-dpt-0; choose from 1 to 6"),
        (["--task", "boolq", "--functional"], "is a run and has its own task; leave --task out"),
        (["--rows", "5"], "do nothing without --functional or --suggest"),
        (["--burstiness", "--suggest"], "--burstiness measures a backbone, not a prompt"),
        (["--burstiness", "--samples", "1"], "samples is 1; a distribution needs at least 2"),
        (["--samples", "5"], "--samples does nothing without --burstiness"),
        (["--gradient", "--samples", "5"], "--samples does nothing without --burstiness"),
    ],
)
def test_rank_refuses_flags_that_do_not_fit(flags: list[str], sentence: str, run: Path) -> None:
    assert sentence in call("rank", run, *flags).sentence


def test_rank_wrong_usage_exits_2(run: Path) -> None:
    called = call("rank", run, "--rows", "-1", "--functional")
    assert called.code == 2
    assert "rows is -1; it must be 0 (all) or more" in " ".join(called.err.split())


def test_rank_refuses_sources_without_a_prompt(folder: Path, adapter: Path) -> None:
    assert "is not finished; give a finished run" in call("rank", folder / "stopped").sentence
    assert "is the baseline full and has no prompt" in call("rank", folder / "whole").sentence
    assert "is a PEFT folder and has no checkpoints" in call("rank", adapter, "--checkpoints").sentence
    assert "say which one scores it with --task" in call("rank", adapter, "--functional").sentence
    save_file({"base_model.lora_A": torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    assert "and no prompt_embeddings; give a prompt-tuning adapter" in call("rank", adapter).sentence
    save_file({"prompt_embeddings": torch.full((2, 2), torch.nan)}, adapter / "adapter_model.safetensors")
    assert "a prompt is a matrix of finite numbers" in call("rank", adapter).sentence


def test_rank_without_checkpoints_or_matplotlib(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoints"))
    assert "has no checkpoints left" in call("rank", bare, "--checkpoints").sentence
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[report]'" in call("rank", run, "--out", tmp_path / "out").sentence
    assert not (tmp_path / "out").exists()


@pytest.fixture
def rank_1_update(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> Path:
    """A plain prompt that is its initial prompt plus a matrix of rank 1."""
    where = ["--backbone", llama_folder, "--task", ticket_task, "--out", tmp_path, *QUICK]
    # At this rate a step is lost in rounding, so the file holds the initial prompt, without any code that rebuilds it.
    result = call("train", *where, "--lr", "1e-30", "plain", "--length", "6").result
    file = Path(result["run"]) / "softprompt.safetensors"
    tensors, draw = load_file(file), torch.Generator().manual_seed(1)
    tensors["matrix"] += 3 * torch.randn(6, 1, generator=draw) @ torch.randn(1, 32, generator=draw)
    save_file(tensors, file)
    return Path(result["run"])


def test_part_update_recovers_an_update_of_rank_1(rank_1_update: Path, tmp_path: Path) -> None:
    """Seen failing with P0 drawn from another seed."""
    scored = ["--functional", "--split", "train", "--rows", "0", "--out", tmp_path / "out"]
    called = call("rank", rank_1_update, *scored, "--part", "update")
    [prompt] = called.result["prompts"]
    assert prompt["ranks"]["update"]["numerical"] == 1
    assert prompt["ranks"]["prompt"]["numerical"] == 6
    functional = prompt["functional"]
    assert functional["part"] == "update"
    initial, full = functional["truncations"]
    assert (initial["rank"], full["rank"]) == (0, 1)
    assert full["score"] == functional["full"]["value"]
    assert full["drop"] == {"value": 0.0, "ci_low": 0.0, "ci_high": 0.0, "p_value": 1.0}
    assert initial["score"] != functional["full"]["value"]
    assert "the update truncated to lower ranks" in " ".join(called.err.split())
    assert "rank k of the update P" in (tmp_path / "out/score_by_rank.svg").read_text()
    [prompt] = call("rank", rank_1_update, *scored, "--ranks", "1").result["prompts"]
    assert prompt["functional"]["part"] == "prompt"
    assert prompt["functional"]["truncations"][0]["score"] != prompt["functional"]["full"]["value"]
    assert "rank k of the prompt P" in (tmp_path / "out/score_by_rank.svg").read_text()


def test_rank_after_the_init_prompt_is_deleted(
    run: Path, folder: Path, llama_folder: Path, ticket_task: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(run, first)
    where = ["--backbone", llama_folder, "--task", ticket_task, "--out", tmp_path, *QUICK, "--init-prompt", first]
    second = call("train", *where, "--name", "second", "plain", "--length", "6").result["run"]
    [prompt] = call("rank", second, "--checkpoints").result["prompts"]
    assert prompt["history"][0]["prompt"]["numerical"] == 2  # the start is the other run's prompt
    shutil.rmtree(first)
    [prompt] = call("rank", second, "--checkpoints").result["prompts"]
    assert [at["step"] for at in prompt["history"]] == [2, 4]
    assert "update" not in prompt["ranks"]
    assert "its initial prompt P0 cannot be rebuilt" in prompt["note"]
    sentence = call("rank", second, "--functional", "--part", "update").sentence
    assert "the update of second cannot be truncated, since its initial prompt P0 is not known (" in sentence
    assert "truncate the prompt itself with --part prompt" in sentence
