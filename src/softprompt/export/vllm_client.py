"""Rows for vLLM's `prompt_embeds`: a soft prompt, then the text's own embeddings.

Copied into an export as `client.py` and imports nothing of softprompt: torch, safetensors and transformers are enough.

    python client.py sentiment "A film that earns its tears."     # the base64 that /v1/completions takes
"""

import base64
import io
import sys
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer


@final
class Prompts:
    """The prompts of an export, and the embedding table that they stand in front of."""

    def __init__(self, folder: Path) -> None:
        self.prompts = load_file(folder / "prompts.safetensors")
        self.embedding = load_file(folder / "embedding.safetensors")["embedding"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)

    def ids(self, text: str, *, control: bool = False) -> list[int]:
        """The text's tokens as the prompt was trained with: special tokens in front stay, those behind go.

        Args:
            control: take control tokens (`<|im_end|>`) in the text, which a template may have; never with users' words.

        Raises:
            ValueError: the text holds a control token.
        """
        made = self.tokenizer(text, return_special_tokens_mask=True)
        ids, special = list(made["input_ids"]), list(made["special_tokens_mask"])
        known = {
            index: token.content
            for index, token in self.tokenizer.added_tokens_decoder.items()
            if (token.special and len(token.content) > 1) or (token.content[:1] in "<[" and token.content[-1:] in ">]")
        }
        for one, is_special in zip(ids, special, strict=True):
            if not control and not is_special and one in known and known[one] in text:
                raise ValueError(
                    f"the text holds the control token {known[one]!r}; leave it out, or give control=True where the "
                    "template has it and no user does"
                )
        while ids and special[len(ids) - 1] and 0 in special[: len(ids)]:
            ids.pop()
        return ids

    def rows(self, name: str, text: str, *, control: bool = False) -> torch.Tensor:
        """What goes into `LLM.generate({"prompt_embeds": ...})`: `[tokens, hidden]` in the model's own type."""
        table = self.embedding
        return torch.cat([self.prompts[name].to(table.dtype), table[torch.tensor(self.ids(text, control=control))]])

    def encoded(self, name: str, text: str, *, control: bool = False) -> str:
        """What goes into the `prompt_embeds` field of `/v1/completions`; vLLM reads it with `weights_only=True`."""
        stream = io.BytesIO()
        torch.save(self.rows(name, text, control=control), stream)
        return base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
    sys.stdout.write(Prompts(Path(__file__).parent).encoded(sys.argv[1], sys.argv[2]) + "\n")
