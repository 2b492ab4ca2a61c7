"""Where a backbone is, and which kind of model it is."""

from pathlib import Path
from typing import Any, Literal

import transformers

from softprompt import assets
from softprompt.backbones import gguf, loading

Architecture = Literal["causal", "encoder_decoder", "encoder", "vision"]
"""The kind of model, which decides how a prompt is attached."""

_AUTO_CLASSES: dict[Architecture, type[Any]] = {
    "causal": transformers.AutoModelForCausalLM,
    "encoder_decoder": transformers.AutoModelForSeq2SeqLM,
    "encoder": transformers.AutoModel,
    "vision": transformers.AutoModel,
}


def locate(source: str) -> tuple[str, str, str]:
    """The folder or Hub id to load from, the base model to record in run folders, and a note on the weights."""
    if not source.strip():
        raise ValueError(f"the backbone is {source!r}; give a Hub id, a folder, a .gguf file or an asset")
    if source in assets.ASSETS:
        asset = assets.ASSETS[source]
        if asset.kind != "model":
            raise ValueError(f"asset {source!r} is data, not a model; models are {', '.join(_model_assets())}")
        path = assets.fetch(source)
        folder = gguf.convert(path, asset.sha256) if path.suffix == ".gguf" else path
        return str(folder), asset.base, asset.note
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"backbone {source!r} does not exist; give the path of a .gguf file")
        return str(gguf.convert(path)), str(path.resolve()), "dequantized from a GGUF file"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"folder {source!r} has no config.json; give a folder that transformers can load")
        return str(path.resolve()), str(path.resolve()), ""
    return source, source, ""


def _model_assets() -> list[str]:
    return [name for name, asset in assets.ASSETS.items() if asset.kind == "model"]


def read_config(folder: str, source: str) -> Any:
    """The model's config; raises `ValueError` where it cannot be used, and `FileNotFoundError` where there is none."""
    try:
        return loading.load_config(folder, source)
    except OSError as error:
        if Path(folder).is_dir():
            raise ValueError(f"the config.json of {source} cannot be read ({error})") from error
        raise FileNotFoundError(
            f"backbone {source!r} is neither a folder, a .gguf file, an asset ({', '.join(_model_assets())}) nor a Hub "
            "id that can be reached or is in the Hub's cache; check the name, or fetch the model first"
        ) from error


def architecture_of(config: Any) -> Architecture:
    """The kind of model that a config describes."""
    if config.is_encoder_decoder:
        return "encoder_decoder"
    if loading.is_multimodal(config):
        return "causal"  # its text model
    names = config.architectures or []
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "causal"
    # A vision model may have a vocabulary too: BEiT's of visual tokens.
    model_class = transformers.MODEL_MAPPING.get(type(config), object)
    reads_pixels = getattr(model_class, "main_input_name", "") == "pixel_values"
    return "vision" if reads_pixels or not hasattr(config, "vocab_size") else "encoder"


def auto_class_of(architecture: Architecture, config: Any) -> type[Any]:
    """The transformers class to load with; an encoder gets a masked-LM head only if the checkpoint has one."""
    if architecture == "encoder" and any(name.endswith("ForMaskedLM") for name in config.architectures or []):
        return transformers.AutoModelForMaskedLM
    return _AUTO_CLASSES[architecture]
