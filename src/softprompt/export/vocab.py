"""Prompts as tokens: a full checkpoint whose vocabulary has them, so that any engine serves them as plain token ids."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from tokenizers import AddedToken

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.evaluation.predict import pad_id
from softprompt.export.base import Format, Trained, close, embedding_scale, refuse_gap
from softprompt.export.extended_vocabulary import grown
from softprompt.export.probe import TEXTS, Probe, left_padded, probe, text_ids
from softprompt.models import PROMPTED_MODELS
from softprompt.tasks import answer_ids

USAGE = "prompts.json"


@final
class Vocab(Format):
    """A checkpoint that transformers loads as it is, with a token a row of each prompt, and `prompts.json`.

    A row is `[prompt's ids; text's ids]`, the text tokenised as the run did: what the tokenizer puts in front (a
    beginning of sequence) comes behind the prompt, and a decoder's text has no closing tokens. `prompts.json` gives the
    ids, and the same as text wherever text gives the same ids. `generation_config.json` suppresses the new tokens:
    transformers then never says one, greedy, sampled or by beams; for engines that do not read it, `prompts.json` has
    the ids for a request's `logit_bias`, and how much probability they had at most where nothing suppressed them.

    Costs a checkpoint of the backbone's size, and a head of its own where head and embedding were one.
    """

    name: ClassVar[str] = "vocab"
    many: ClassVar[bool] = True
    worded: ClassVar[bool] = True

    def refusal(self, trained: Trained, backbone: Backbone) -> str:
        """A plain prompt before a decoder's or an encoder-decoder's text."""
        if not trained.folded.plain:
            return (
                f"a token's embedding says nothing of other tokens, and {trained.run.experiment.method} also changes "
                "the input's own embeddings; export to npz, serve it with softprompt serve, or train dpt or residual"
            )
        if backbone.architecture not in ("causal", "encoder_decoder"):
            return (
                f"{backbone.source} is a model of the kind {backbone.architecture}, whose answer does not come as text "
                "behind a row; export to npz, or serve it with softprompt serve"
            )
        if backbone.quantized:
            return (
                f"the backbone's weights are held as {backbone.quantized}, and a checkpoint needs them whole; train in "
                "bfloat16, or export to npz"
            )
        if embedding_scale(backbone) is None:
            return (
                f"{backbone.source} does more to its embedding table than scale it, so no row of the table is the "
                "prompt; export to npz, or serve it with softprompt serve"
            )
        return ""

    def write(self, trained: Sequence[Trained], backbone: Backbone, folder: Path) -> None:
        """Checkpoint, tokenizer and `prompts.json`."""
        old = len(backbone.model.get_input_embeddings().weight)
        first = max(old, len(backbone.tokenizer))
        tokenizer = _tokenizer(backbone.tokenizer, trained, first)
        rows = torch.cat([one.folded.prompt().detach().float().to(backbone.device) for one in trained])
        new = grown(backbone, rows, first - old, _quietest(trained, backbone))
        new.save_pretrained(folder)
        never = list(range(old, first + len(rows)))
        _suppress(folder / "generation_config.json", never)
        tokenizer.save_pretrained(folder)
        ids = {one.name: tokenizer.convert_tokens_to_ids(_tokens(one)) for one in trained}
        as_text = _as_text(tokenizer, trained[0], ids[trained[0].name], backbone)
        usage = {
            "backbone": backbone.base,
            "layout": "the prompt's ids, then the text's own ids"
            + ("" if PROMPTED_MODELS[backbone.architecture].appends_eos else " without closing tokens"),
            "never_said": never,
            "as_text": as_text,
            "prompts": {one.name: _entry(one, ids[one.name], as_text, backbone) for one in trained},
        }
        files.write_text(folder / USAGE, json.dumps(usage, indent=1))

    @torch.no_grad()
    def check(self, trained: Sequence[Trained], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """The checkpoint in plain transformers against the live runs, on fixed texts with the prompts mixed."""
        usage = files.read_json(folder / USAGE)
        model = _loaded(backbone, folder)
        ids = [usage["prompts"][one.name]["ids"] for one in trained]
        never = torch.tensor(usage["never_said"])
        own = model.get_input_embeddings()
        for one, its in zip(trained, ids, strict=True):
            wanted = one.folded.prompt().detach().to(own.weight)
            rounding = 0.0 if embedding_scale(backbone) == 1.0 else torch.finfo(wanted.dtype).eps * 4
            close(own(torch.tensor(its).to(own.weight.device)), wanted, rounding, f"the embedding of {one.name}")
        gap = size = mass = 0.0
        for part in probe(trained, backbone):
            raw, scores = _first_token(model, part, ids, backbone)
            old = part.logp.shape[1]
            theirs = raw[:, :old].log_softmax(-1)
            gap = max(gap, float((theirs - part.logp).abs().max()))
            size = max(size, float(part.logp.abs().max()))
            mass = max(mass, float(raw.softmax(-1)[:, never].sum(-1).max()))
            if bool((scores[:, never] > -torch.inf).any()):
                raise ValueError(
                    "transformers could say a prompt's token; the export is dropped, please report the backbone"
                )
        compared = refuse_gap(gap, size, backbone, "the checkpoint", "nat of log-probability")
        files.write_text(folder / USAGE, json.dumps({**usage, "unsuppressed_probability": mass}, indent=1))
        return {
            "prompts": {one.name: len(its) for one, its in zip(trained, ids, strict=True)},
            "as_text": usage["as_text"] is not None,
            **compared,
            "unsuppressed_probability": mass,
        }


def _suppress(file: Path, never: Sequence[int]) -> None:
    """Written into the file: transformers saves a published configuration that it finds fault with, if unchanged."""
    values = files.read_json(file)
    values["suppress_tokens"] = sorted({*(values.get("suppress_tokens") or ()), *never})
    files.write_text(file, json.dumps(values, indent=2))


def _tokens(trained: Trained) -> list[str]:
    """`<word>` as one token a row: `<word-0>`, `<word-1>`, ..."""
    return [f"{trained.word[:-1]}-{row}>" for row in range(len(trained.folded.matrix))]


def _tokenizer(tokenizer: Any, trained: Sequence[Trained], first: int) -> Any:
    """A copy with the prompts' tokens from the id `first` on, behind one filler for each row of padding in the table.

    Rows of padding are not used for prompts: the head has rows for them too, which are part of what the run scored.

    Raises:
        ValueError: a token is there already, or the tokenizer's ids have holes.
    """
    new = copy.deepcopy(tokenizer)
    fillers = [f"<no-token-{number}>" for number in range(len(tokenizer), first)]
    tokens = [token for one in trained for token in _tokens(one)]
    new.add_tokens([AddedToken(token, special=True, normalized=False) for token in fillers + tokens], True)
    if new.convert_tokens_to_ids(tokens) != list(range(first, first + len(tokens))):
        raise ValueError(
            f"the tokenizer does not give {tokens[0]} the id {first}: the word is taken, or its ids have holes; "
            "give the prompt another word with --token-names"
        )
    return new


def _quietest(trained: Sequence[Trained], backbone: Backbone) -> int:
    """The token whose greatest probability in the probe is the least."""
    most = torch.stack([part.logp.amax(0) for part in probe(trained, backbone)]).amax(0)
    return int(most.argmin())


def _as_text(tokenizer: Any, trained: Trained, ids: Sequence[int], backbone: Backbone) -> dict[str, Any] | None:
    """How `tokenizer(prefix + text)` gives a row's ids: with its special tokens, or with those in front spelt out.

    None where neither does (SentencePiece tokenizers treat a text's first word in their own way): ids alone then.
    """
    rows = text_ids(backbone, TEXTS, PROMPTED_MODELS[backbone.architecture].appends_eos)
    lead = ""
    for count in range(len(rows[0])):
        if rows[0][count] not in backbone.tokenizer.all_special_ids or len({row[: count + 1] for row in rows}) > 1:
            break
        lead += backbone.tokenizer.convert_ids_to_tokens(rows[0][count])
    for prefix, special in (("", True), (lead, False)):
        front = "".join(_tokens(trained)) + prefix
        made = tokenizer([front + text for text in TEXTS], add_special_tokens=special)["input_ids"]
        if made == [[*ids, *row] for row in rows]:
            return {"behind_prompt": prefix, "add_special_tokens": special}
    return None


def _entry(trained: Trained, ids: Sequence[int], as_text: Any, backbone: Backbone) -> dict[str, Any]:
    task = trained.run.task
    token_names = {}
    if task.is_classification:
        token_names = dict(zip(task.label_words, map(list, answer_ids(task, backbone.tokenizer)), strict=True))
    text = None if as_text is None else "".join(_tokens(trained)) + as_text["behind_prompt"]
    return {"ids": list(ids), "text": text, "template": task.template, "answers": token_names}


def _loaded(backbone: Backbone, folder: Path) -> Any:
    """By the model's own class, as the Auto classes would."""
    model = type(backbone.model).from_pretrained(folder, dtype=backbone.dtype, trust_remote_code=False)
    return model.to(backbone.device).eval()


def _first_token(
    model: Any, part: Probe, prompts: Sequence[Sequence[int]], backbone: Backbone
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the first token that `generate` would say, and what it makes of them, for rows of plain ids."""
    rows = [[*prompts[which], *ids] for which, ids in zip(part.which.tolist(), part.ids, strict=True)]
    if backbone.architecture == "encoder_decoder":  # whose positions are counted from the row's begin
        ids, mask = (side.flip(1) for side in left_padded([row[::-1] for row in rows], pad_id(backbone)))
    else:
        ids, mask = left_padded(rows, pad_id(backbone))
    made = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=1,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    return made.logits[0].float().cpu(), made.scores[0].float().cpu()
