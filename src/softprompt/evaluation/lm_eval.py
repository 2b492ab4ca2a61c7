"""EleutherAI's lm-evaluation-harness on a run: its tasks, its wordings and its metrics, with our prompt in front.

`softprompt lm-eval RUN --tasks ...`, or the harness's own command line with the model type `softprompt`:

    python -m softprompt.evaluation.lm_eval --model softprompt --model_args run=RUN --tasks arc_easy
"""

from typing import Any, final

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from softprompt.backbones import load
from softprompt.evaluation.predict import pad_id
from softprompt.models import model_class
from softprompt.models.sampling import before_end
from softprompt.runs import resolve_prompt


@final
@register_model("softprompt")
class SoftPromptLM(HFLM):
    """The harness's `hf` model with a run's prompt before every row; without a run it is `hf`.

    Args:
        run: the folder of a run or of a PEFT prompt, or `hub:USER/NAME`; None: the backbone alone, zero-shot.
        backbone: where the backbone is, as `load_backbone` takes it; None: where the run recorded it.
        dtype: of a backbone without a run.
        settings: further arguments of `HFLM`, such as `batch_size`.

    Raises:
        ValueError: neither run nor backbone is given, the backbone is not a decoder, or the prompt is after the text.
    """

    def __init__(
        self, run: str | None = None, backbone: str | None = None, dtype: Any = "auto", **settings: Any
    ) -> None:
        if run is None and backbone is None:
            raise ValueError("give lm-eval's model a run=FOLDER, or a backbone=NAME for zero-shot scores")
        # The harness brings the tasks; a PEFT folder needs one to be opened, and any does.
        opened = None if run is None else resolve_prompt(run, task="sentiment")
        if opened is not None and opened.experiment.prompt_position == "suffix":
            # The harness sends a text and its continuation as one row; a prompt behind both changes no score.
            raise ValueError(
                f"the prompt of {opened.folder} is after the text, and lm-eval scores texts that end with the answer; "
                "use softprompt evaluate, or train one with prompt_position=prefix"
            )
        loaded = load(str(backbone), dtype=dtype) if opened is None else opened.load_backbone(backbone)
        if not model_class(loaded).decoder_only:
            raise ValueError(
                f"{loaded.source} is a model of the kind {loaded.architecture}, but lm-eval needs a decoder; give one"
            )
        settings.pop("device", None)  # the model is loaded already
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, **settings)
        self.prompted = None if opened is None else opened.prompted(loaded)
        if self.prompted is not None and self.prompted.prompt is None:
            # A baseline changed the weights of a copy, and has no prompt.
            self._model, self.prompted = self.prompted.backbone.model, None
        if self.prompted is not None and self.prompted.prompt is not None:
            self.prepared = self.prompted.prepare([self.prompted.prompt])
            self._max_length = self.max_length - self.prompted.prompt_length

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self.prompted is None:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        with torch.no_grad():
            return self.prompted(inps, prompts=self.prepared).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        if self.prompted is None:
            tokens: Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
            return tokens
        if generation_kwargs.get("do_sample") or generation_kwargs.get("num_beams", 1) != 1:
            raise ValueError(
                "lm-eval's task asks for sampling or beams, but a run generates greedily; choose a greedy task"
            )
        steps: list[Tensor] = []
        for token in self.prompted.generate(
            context,
            generation_kwargs.get("attention_mask"),
            max_new_tokens=max_length - context.shape[1],
            prompts=self.prepared,
        ):
            steps.append(token)
            texts = self.tokenizer.batch_decode(torch.stack(steps, 1))
            if all(any(end in text for end in stop) for text in texts):
                break
        ends, pad = self.prompted.end_of_sequence(), pad_id(self.prompted.backbone)
        answers = [before_end(row, ends) for row in torch.stack(steps, 1).tolist()]
        padded = [[*row, *[pad] * (len(steps) - len(row))] for row in answers]
        return torch.cat([context, torch.tensor(padded, device=context.device)], 1)


def main() -> None:
    """The harness's own command line, with the model type `softprompt`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
