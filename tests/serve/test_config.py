"""The configuration of a service: what it rejects, and where its sources, backbone and tokens come from."""

from pathlib import Path
from typing import Any

import pytest

from softprompt import open_run
from softprompt.serve.config import RayConfig, ServeConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grace": -1.0}, "grace is -1.0"),
        ({"grace": float("nan")}, "grace is nan"),
        ({"sources": ("bad name=runs/one",)}, "'bad name' cannot be a prompt name"),
    ],
)
def test_config_with_a_bad_value_is_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeConfig(**settings)


@pytest.mark.parametrize("settings", [{"replicas": 0}, {"cpus": 0.0}, {"gpus": -1.0}])
def test_ray_config_with_a_bad_value_is_rejected(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="they must be"):
        RayConfig(**settings)


def test_backbone_source_is_of_the_flag_or_the_first_run(run_folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()  # of PEFT, without a config that names the base model
    sources = (str(tmp_path), f"other={run_folders[0]}")
    assert ServeConfig(sources=sources).backbone_source() == open_run(run_folders[0]).experiment.backbone
    assert ServeConfig(sources=sources, backbone="smollm2-135m").backbone_source() == "smollm2-135m"
    with pytest.raises(ValueError, match=r"no folder names its backbone .*; give --backbone"):
        ServeConfig(sources=(str(tmp_path),)).backbone_source()


def test_auth_reads_files_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_TOKEN", "from-environment")
    monkeypatch.delenv("SOFTPROMPT_ADMIN_TOKEN", raising=False)
    file = tmp_path / "tokens"
    file.write_text("one\n\n two \n")
    assert ServeConfig(host="0.0.0.0").auth().tokens == ("from-environment",)
    assert ServeConfig(host="0.0.0.0", token_file=file).auth().tokens == ("one", "two")
