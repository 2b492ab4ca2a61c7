"""Loading with transformers: nothing is made up, no code of a model's folder runs, and no warning is swallowed."""

import json
import logging
import pickle
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In the order in which transformers looks for them, each also as an index of shards (`NAME.index.json`)."""
_BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|token_type_ids)$")
"""What older checkpoints keep beside their weights: tables that today's code computes."""
_SHOWN = 3
_WITH_A_TEXT_MODEL = ("gemma3", "mistral3", "llava", "llava_next", "idefics3", "smolvlm")
"""Models of text and images whose text, on its own, passes through a plain decoder."""
_LOGGERS = ("transformers", "accelerate")
_listening = threading.RLock()
"""Loggers and warnings are of the whole process: one thread at a time may put its own ears on."""


@final
class LoadingWarning(UserWarning):
    """What a user should know of a model that was loaded; the command line shows it as a note."""


def tell(text: str) -> None:
    """Warn with a `LoadingWarning`."""
    warnings.warn(text, LoadingWarning, stacklevel=3)


def config(folder: str, source: str) -> Any:
    """The configuration of the model in `folder` (or of that hub id).

    Args:
        folder: what transformers is asked for.
        source: what the user asked for, for messages.

    Raises:
        OSError: nothing can be found there.
        ValueError: the model needs code of its own, or a model that this version of transformers does not know.
    """
    values, _ = PretrainedConfig.get_config_dict(folder)
    kernels = [values.get(key) for key in ("attn_implementation", "_attn_implementation")]
    if any("/" in str(kernel) for kernel in kernels):
        raise ValueError(
            f"{source} names attention code to be downloaded ({next(k for k in kernels if k)!r} in its config.json), "
            "and code of a model is never run here; take that entry out"
        )
    model_type = values.get("model_type")
    has_code = bool(values.get("auto_map"))
    if has_code and not _is_known(model_type):
        raise ValueError(
            f"{source} brings code of its own (auto_map in its config.json), which is never run, and transformers does "
            f"not know its model type {model_type!r}; choose a model that transformers knows"
        )
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"the config.json of {source} cannot be used: {_first_line(error)}") from error
    if has_code:
        tell(
            f"{source} brings code of its own (auto_map in its config.json), which is not run; transformers' own "
            f"{model_type} reads its weights"
        )
    return found


def _is_known(model_type: Any) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def tokenizer(folder: str, source: str, config: Any, rows: int, **given: Any) -> Any:
    """The fast tokenizer in `folder`, which must fit a model with `rows` input embeddings.

    Raises:
        ValueError: it is missing, needs code of its own, is not a fast one, or has more tokens than the model.
    """
    try:
        with heard(source):
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **given)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if "custom code" in str(error):
            raise ValueError(
                f"the tokenizer of {source} brings code of its own (auto_map in its tokenizer_config.json), which is "
                "never run; save it as a tokenizer.json first"
            ) from error
        raise ValueError(f"{source} has no tokenizer that can be read ({_first_line(error)})") from error
    if not found.is_fast:
        raise ValueError(f"{source} has no fast tokenizer, which truncation needs; convert it to tokenizer.json first")
    if get_tokenizer_config(folder).get("auto_map"):
        tell(
            f"the tokenizer of {source} brings code of its own (auto_map in its tokenizer_config.json), which is not "
            f"run; transformers' own {type(found).__name__} reads it"
        )
    _refuse_unfit(found, source, config, rows)
    return found


def _refuse_unfit(tokenizer: Any, source: str, config: Any, rows: int) -> None:
    ordinary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    if (last := max(ordinary, default=-1)) >= rows:
        raise ValueError(
            f"the tokenizer of {source} has ids up to {last}, and its embedding table has {rows} rows; it belongs to "
            "another model"
        )
    beyond = sorted(token for token, index in tokenizer.get_added_vocab().items() if index >= rows)
    if beyond:
        tell(
            f"the tokenizer of {source} has added tokens outside the {rows} rows of the embedding table "
            f"({_named(beyond)}); rows with them are refused"
        )
    for name in ("bos", "eos", "pad"):
        said, own = getattr(config, f"{name}_token_id", None), getattr(tokenizer, f"{name}_token_id")
        ids = said if isinstance(said, list) else [said]
        if said is not None and own is not None and own not in ids:
            tell(
                f"the config.json of {source} says {name}_token_id {said}, and its tokenizer's is {own} "
                f"({tokenizer.convert_ids_to_tokens(own)!r}); check that the two belong together"
            )


def is_multimodal(config: Any) -> bool:
    """Whether a configuration is of a model that also reads images or sound."""
    return any(getattr(config, f"{kind}_config", None) is not None for kind in ("vision", "audio"))


def text_model(config: Any, source: str) -> dict[str, Any]:
    """How the text model alone is loaded from a checkpoint of text and images.

    Raises:
        ValueError: its text does not pass through a plain decoder.
    """
    text = config.get_text_config()
    if config.model_type not in _WITH_A_TEXT_MODEL or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{source} ({config.model_type}) is a model of text and images or sound, which are not taken together; "
            "give a text model alone"
        )
    tell(f"{source} is a model of text and images ({config.model_type}); only its text model is loaded")
    text.tie_word_embeddings = config.tie_word_embeddings  # of the two, the one that counts in the whole model
    # Files of earlier versions of transformers and of this one put the text model under different names.
    names = {r"^language_model\.": "", r"^model\.language_model\.": "model.", r"^model\.text_model\.": "model."}
    return {"config": text, "key_mapping": names}


def pretrained(kind: Any, folder: str, source: str, **given: Any) -> Any:
    """`kind.from_pretrained(folder, **given)`, where every weight must come from the checkpoint.

    Args:
        kind: a class with `from_pretrained`.
        folder: what transformers is asked for.
        source: what the user asked for, for messages.
        given: further arguments of `from_pretrained`.

    Raises:
        ValueError: tensors are missing, of another shape or left over inside the model's layers; a file is damaged; or
            transformers has no such model.
        FileNotFoundError: a file of weights is not there.
    """
    if Path(folder).is_dir() and "gguf_file" not in given:
        _check_files(Path(folder))
    try:
        with heard(source):
            model, report = kind.from_pretrained(
                folder, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **given
            )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, OSError, EOFError, SafetensorError, pickle.UnpicklingError, KeyError) as error:
        if "Unrecognized configuration class" in str(error):
            config = given.get("config")
            name = getattr(config, "model_type", "its type")
            raise ValueError(
                f"{source} is a {name}, for which transformers has no {kind.__name__}; choose another model"
            ) from error
        raise ValueError(f"the weights of {source} cannot be read ({_first_line(error)})") from error
    _check_report(model, report, source)
    return model


def _check_report(model: nn.Module, report: Mapping[str, Any], source: str) -> None:
    if mismatched := sorted(report["mismatched_keys"]):
        name, held, wanted = mismatched[0]
        more = f" (and {len(mismatched) - 1} more tensors)" if len(mismatched) > 1 else ""
        raise ValueError(
            f"{source} holds {name} of shape {tuple(held)}, and its config.json makes it {tuple(wanted)}{more}; "
            "the checkpoint and its config.json do not belong together"
        )
    if report["error_msgs"]:
        raise ValueError(f"the weights of {source} cannot be loaded ({_first_line(report['error_msgs'][0])})")
    parameters = dict(model.named_parameters())
    poolers = [name for name in report["missing_keys"] if "pooler" in name.split(".")]
    missing = sorted({name for name in report["missing_keys"] if name in parameters} - set(poolers))
    left_over = sorted(name for name in report["unexpected_keys"] if not _BUFFERS.search(name))
    if missing:
        wrapped = _wrapper(missing, left_over)
        cause = f", while it holds {len(left_over)} others ({_named(left_over)})" if left_over else ""
        if wrapped:
            cause = f"; its tensors begin with {wrapped!r}, which a wrapper left: save the model without it"
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(parameters)} tensors, which would be random numbers "
            f"({_named(missing)}){cause}"
        )
    modules = dict(model.named_modules())
    inside = [name for name in left_over if _is_inside(name, modules)]
    if inside:
        raise ValueError(
            f"{source} holds {len(inside)} tensors that the model of its config.json has no place for "
            f"({_named(inside)}); the checkpoint and its config.json do not belong together"
        )
    if unused := [name for name in left_over if "pooler" not in name.split(".")]:
        tell(f"{source} holds {len(unused)} tensors that are not used here ({_named(unused)})")
    with torch.no_grad():
        for name in poolers:  # no result depends on them, but random ones would change the weights' hash at every load
            if name in parameters:
                parameters[name].zero_()


def _is_inside(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor would belong to a part that the model has: a stack of layers, or a module without children."""
    parents = name.split(".")[:-1]
    if isinstance(whole := modules.get(".".join(parents)), nn.Module) and parents and not any(whole.children()):
        return True
    return any(isinstance(modules.get(".".join(parents[:n])), nn.ModuleList) for n in range(1, len(parents) + 1))


def _wrapper(missing: Iterable[str], left_over: Iterable[str]) -> str:
    """The prefix that every missing name has in the checkpoint; empty where there is no such prefix."""
    first, *_ = missing
    held = set(left_over)
    prefixes = [name.removesuffix(first) for name in held if name.endswith(f".{first}")]
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in held for name in missing)), "")


def _check_files(folder: Path) -> None:
    """Refuse weights that are not there or were cut off."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a PEFT adapter (adapter_config.json) beside a model, and transformers would put it into "
            "the weights; merge it into the model, or move it elsewhere"
        )
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            _check_shards([folder / name])
            return
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is no index of shards ({error}); fetch it again") from error
            _check_shards([folder / str(shard) for shard in shards])
            return
    raise FileNotFoundError(
        f"{folder} holds no weights: it has neither {' nor '.join(_WEIGHTS)}; fetch the model again"
    )


def _check_shards(files: Iterable[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there, and its index names it; fetch the model again")
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass  # which compares the header's sizes with the file's
            elif file.stat().st_size == 0:
                raise EOFError("it is empty")
        except (SafetensorError, OSError, EOFError) as error:
            pointer = file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs")
            what = "is a pointer of Git LFS, not the file itself" if pointer else f"is cut off or damaged ({error})"
            raise ValueError(f"{file} {what}; fetch it again") from error


@contextmanager
def heard(source: str) -> Iterator[None]:
    """Tell what transformers and accelerate log or warn of in the block, once each, in place of their own output."""
    collected: list[str] = []
    with _listening:
        before = []
        for logger in map(logging.getLogger, _LOGGERS):
            before.append((logger, logger.level, logger.handlers[:], logger.propagate))
            logger.handlers, logger.propagate = [_Collector(collected)], False
            logger.setLevel(logging.WARNING)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", UserWarning)
                yield
        finally:
            for logger, level, handlers, propagate in before:
                logger.setLevel(level)
                logger.handlers, logger.propagate = handlers, propagate
    collected += [str(warning.message) for warning in caught]
    for text in dict.fromkeys(" ".join(text.split()) for text in collected):
        tell(f"{source}: {text}")


@final
class _Collector(logging.Handler):
    def __init__(self, kept: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "LOAD REPORT" not in text and "Status" not in text:  # see _check_report, which reads the same report
            self._kept.append(text)


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
