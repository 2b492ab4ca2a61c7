"""Loading with transformers: no weight is initialized at random, no code of a model runs, and no warning is lost."""

import json
import logging
import pickle
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from softprompt.files import first_line
from softprompt.types import LoadingWarning

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In transformers' order of precedence; each may also be an index of shards (`NAME.index.json`)."""
_BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|token_type_ids)$")
"""Buffers in older checkpoints, which transformers now computes."""
_MAX_LISTED = 3
"""Names in one message."""
_WITH_TEXT_DECODER = ("gemma3", "mistral3", "llava", "llava_next", "idefics3", "smolvlm")
"""Multimodal model types whose text model is a plain decoder."""
_LOGGERS = ("transformers", "accelerate")
_logging_lock = threading.RLock()
"""Loggers and warning filters are global, so only one thread at a time may replace them."""


def _warn(text: str) -> None:
    warnings.warn(text, LoadingWarning, stacklevel=3)


def load_config(folder: str, source: str) -> Any:
    """The config of a model.

    Args:
        folder: the folder or Hub id to load from.
        source: the model that the user asked for, for messages.

    Raises:
        OSError: there is no model at `folder`.
        ValueError: the model needs its own code, or this version of transformers does not support it.
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
    if has_code and not (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
        raise ValueError(
            f"{source} brings code of its own (auto_map in its config.json), which is never run, and transformers does "
            f"not know its model type {model_type!r}; choose a model that transformers knows"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"the config.json of {source} cannot be used: {first_line(error)}") from error
    if has_code:
        _warn(
            f"{source} brings code of its own (auto_map in its config.json), which is not run; transformers' own "
            f"{model_type} reads its weights"
        )
    return config


def load_tokenizer(folder: str, source: str, config: Any, vocab_size: int, **kwargs: Any) -> Any:
    """The fast tokenizer of a model.

    Args:
        folder: the folder or Hub id to load from.
        source: the model that the user asked for, for messages.
        config: the model's config.
        vocab_size: the number of rows in the model's embedding table.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        ValueError: it is missing, needs its own code, is not a fast one, or has more tokens than the model.
    """
    try:
        with _warnings_as_notes(source):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if "custom code" in str(error):
            raise ValueError(
                f"the tokenizer of {source} brings code of its own (auto_map in its tokenizer_config.json), which is "
                "never run; save it as a tokenizer.json first"
            ) from error
        raise ValueError(f"{source} has no tokenizer that can be read ({first_line(error)})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{source} has no fast tokenizer, which truncation needs; convert it to tokenizer.json first")
    if get_tokenizer_config(folder).get("auto_map"):
        _warn(
            f"the tokenizer of {source} brings code of its own (auto_map in its tokenizer_config.json), which is not "
            f"run; transformers' own {type(tokenizer).__name__} reads it"
        )
    _check_tokenizer(tokenizer, source, config, vocab_size)
    return tokenizer


def _check_tokenizer(tokenizer: Any, source: str, config: Any, vocab_size: int) -> None:
    ids = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    if (largest := max(ids, default=-1)) >= vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has ids up to {largest}, but its embedding table has {vocab_size} rows; it "
            "belongs to another model"
        )
    without_row = sorted(token for token, index in tokenizer.get_added_vocab().items() if index >= vocab_size)
    if without_row:
        _warn(
            f"the tokenizer of {source} has added tokens outside the {vocab_size} rows of the embedding table "
            f"({_listed(without_row)}); rows with them are refused"
        )
    for name in ("bos", "eos", "pad"):
        in_config, in_tokenizer = getattr(config, f"{name}_token_id", None), getattr(tokenizer, f"{name}_token_id")
        accepted = in_config if isinstance(in_config, list) else [in_config]
        if in_config is not None and in_tokenizer is not None and in_tokenizer not in accepted:
            _warn(
                f"the config.json of {source} says {name}_token_id {in_config}, but its tokenizer's is {in_tokenizer} "
                f"({tokenizer.convert_ids_to_tokens(in_tokenizer)!r}); check that the two belong together"
            )


def vocab_size_of(model: Any, source: str) -> int:
    """The number of rows of the model's table of token embeddings.

    Raises:
        ValueError: it has no such table, like a model of sound or of pixels.
    """
    try:
        table = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        table = None
    if table is None or table.ndim != 2:
        raise ValueError(
            f"{source} ({model.config.model_type}) has no table of token embeddings, so no prompt can be put in front "
            "of its input; choose another backbone"
        )
    return int(table.shape[0])


def is_multimodal(config: Any) -> bool:
    """Whether the config is of a model that also takes images or sound."""
    return any(getattr(config, f"{kind}_config", None) is not None for kind in ("vision", "audio"))


def text_model_arguments(config: Any, source: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` that load only the text model of a multimodal checkpoint.

    Raises:
        ValueError: its text model is not a plain decoder.
    """
    text = config.get_text_config()
    if config.model_type not in _WITH_TEXT_DECODER or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{source} ({config.model_type}) is a model of text and images or sound, which are not taken together; "
            "give a text model alone"
        )
    _warn(f"{source} is a model of text and images ({config.model_type}); only its text model is loaded")
    text.tie_word_embeddings = config.tie_word_embeddings  # the multimodal model uses its own, not the text config's
    # Earlier versions of transformers saved the text model under other names.
    key_mapping = {r"^language_model\.": "", r"^model\.language_model\.": "model.", r"^model\.text_model\.": "model."}
    return {"config": text, "key_mapping": key_mapping}


def load_model(auto_class: Any, folder: str, source: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(folder, **kwargs)`, and check that every weight comes from the checkpoint.

    Args:
        auto_class: a class with `from_pretrained`.
        folder: the folder or Hub id to load from.
        source: the model that the user asked for, for messages.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        ValueError: the checkpoint lacks tensors, has tensors of another shape, or has tensors that the model's layers
            lack; a file is damaged; or transformers does not support the model.
        FileNotFoundError: a weight file is missing.
    """
    if Path(folder).is_dir() and "gguf_file" not in kwargs:
        _check_files(Path(folder))
    try:
        with _warnings_as_notes(source):
            model, report = auto_class.from_pretrained(
                folder, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, OSError, EOFError, SafetensorError, pickle.UnpicklingError, KeyError) as error:
        if "Unrecognized configuration class" in str(error):
            model_type = getattr(kwargs.get("config"), "model_type", "its type")
            raise ValueError(
                f"{source} is a {model_type}, for which transformers has no {auto_class.__name__}; choose another model"
            ) from error
        raise ValueError(f"the weights of {source} cannot be read ({first_line(error)})") from error
    _check_report(model, report, source)
    return model


def _check_report(model: nn.Module, report: Mapping[str, Any], source: str) -> None:
    if mismatched := sorted(report["mismatched_keys"]):
        name, checkpoint_shape, model_shape = mismatched[0]
        more = f" (and {len(mismatched) - 1} more tensors)" if len(mismatched) > 1 else ""
        raise ValueError(
            f"{source} holds {name} of shape {tuple(checkpoint_shape)}, but its config.json makes it "
            f"{tuple(model_shape)}{more}; the checkpoint and its config.json do not belong together"
        )
    if report["error_msgs"]:
        raise ValueError(f"the weights of {source} cannot be loaded ({first_line(report['error_msgs'][0])})")
    parameters = dict(model.named_parameters())
    poolers = [name for name in report["missing_keys"] if "pooler" in name.split(".")]
    missing = sorted({name for name in report["missing_keys"] if name in parameters} - set(poolers))
    left_over = sorted(name for name in report["unexpected_keys"] if not _BUFFERS.search(name))
    if missing:
        prefix = _wrapper_prefix(missing, left_over)
        cause = f", while it holds {len(left_over)} others ({_listed(left_over)})" if left_over else ""
        if prefix:
            cause = f"; its tensors begin with {prefix!r}, which a wrapper left: save the model without it"
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(parameters)} tensors, which would be random numbers "
            f"({_listed(missing)}){cause}"
        )
    modules = dict(model.named_modules())
    inside = [name for name in left_over if _is_inside(name, modules)]
    if inside:
        raise ValueError(
            f"{source} holds {len(inside)} tensors that the model of its config.json has no place for "
            f"({_listed(inside)}); the checkpoint and its config.json do not belong together"
        )
    if unused := [name for name in left_over if "pooler" not in name.split(".")]:
        _warn(f"{source} holds {len(unused)} tensors that are not used here ({_listed(unused)})")
    with torch.no_grad():
        for name in poolers:  # no result depends on them, but random values would change the backbone's hash
            if name in parameters:
                parameters[name].zero_()


def _is_inside(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor would be inside a part that the model has: a stack of layers, or a module without children."""
    parents = name.split(".")[:-1]
    parent = modules.get(".".join(parents))
    if parents and parent is not None and not any(parent.children()):
        return True
    return any(isinstance(modules.get(".".join(parents[:n])), nn.ModuleList) for n in range(1, len(parents) + 1))


def _wrapper_prefix(missing: Sequence[str], left_over: Iterable[str]) -> str:
    """The prefix that a wrapper gave to every missing name in the checkpoint; empty if there is none."""
    unexpected = set(left_over)
    prefixes = [name.removesuffix(missing[0]) for name in unexpected if name.endswith(f".{missing[0]}")]
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in unexpected for name in missing)), "")


def _check_files(folder: Path) -> None:
    """Check that the weight files exist and are not truncated."""
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
                raise ValueError(f"{index} is not a valid index of shards ({error}); fetch it again") from error
            _check_shards([folder / str(shard) for shard in shards])
            return
    raise FileNotFoundError(
        f"{folder} holds no weights: it has neither {' nor '.join(_WEIGHTS)}; fetch the model again"
    )


def _check_shards(files: Iterable[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there, but its index names it; fetch the model again")
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass  # opening compares the header's sizes with the file's
            elif file.stat().st_size == 0:
                raise EOFError("it is empty")
        except (SafetensorError, OSError, EOFError) as error:
            is_pointer = file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs")
            fault = "is a pointer of Git LFS, not the file itself" if is_pointer else f"is cut off or damaged ({error})"
            raise ValueError(f"{file} {fault}; fetch it again") from error


@contextmanager
def _warnings_as_notes(source: str) -> Iterator[None]:
    """Within the block, turn each distinct warning or log message of the libraries into a `LoadingWarning`."""
    messages: list[str] = []
    with _logging_lock:
        saved = []
        for logger in map(logging.getLogger, _LOGGERS):
            saved.append((logger, logger.level, logger.handlers[:], logger.propagate))
            logger.handlers, logger.propagate = [_Collector(messages)], False
            logger.setLevel(logging.WARNING)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", UserWarning)
                yield
        finally:
            for logger, level, handlers, propagate in saved:
                logger.setLevel(level)
                logger.handlers, logger.propagate = handlers, propagate
    messages += [str(warning.message) for warning in caught]
    for text in dict.fromkeys(" ".join(text.split()) for text in messages):
        _warn(f"{source}: {text}")


@final
class _Collector(logging.Handler):
    """Appends log messages to a list."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "LOAD REPORT" not in text and "Status" not in text:  # _check_report handles the load report
            self._messages.append(text)


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MAX_LISTED} more" if len(listed) > _MAX_LISTED else ""
    return ", ".join(listed[:_MAX_LISTED]) + more
