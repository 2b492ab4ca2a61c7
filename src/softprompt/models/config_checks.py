"""Checks of a model's config: models that cannot give a row its own result, refused before they run.

What shows only when the model runs is checked in `verify.py`.
"""

from softprompt.backbones import Backbone


def sliding_window(backbone: Backbone) -> int | None:
    """The narrowest attention window of any layer; None where every layer attends to all tokens."""
    config = backbone.model.config
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo's name for it
        return int(config.window_size)
    if types is not None and all(kind == "full_attention" for kind in types):
        return None
    if types is None and getattr(config, "use_sliding_window", True) is False:
        return None
    return int(window) if window else None


def check_decoder(backbone: Backbone) -> None:
    """Refuse a decoder with state other than attention's keys and values, or whose forward lacks an argument we need.

    Raises:
        ValueError: it is such a decoder.
    """
    config = backbone.model.config
    other_layers = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    needed = {"past_key_values", "inputs_embeds", "attention_mask", "logits_to_keep"}
    missing = sorted(needed - backbone.forward_arguments)
    if other_layers or missing:
        reason = f"has {', '.join(other_layers)} layers" if other_layers else f"takes no {', '.join(missing)}"
        raise ValueError(
            f"{backbone.source} ({config.model_type}) {reason}; a shared prefix is exact only for attention over "
            "cached keys and values, so this model is refused: choose a decoder with full attention"
        )


def check_batch_independence(backbone: Backbone) -> None:
    """Refuse a model whose result for a row depends on the rest of the batch once rows are long or many.

    Short rows cannot show that: block-sparse attention (BigBird) begins at some hundred tokens, Nystrom's landmarks
    (Nystromformer) are means over the batch's full length, hashed chunks (Reformer) are random, and experts of limited
    capacity (Switch) drop tokens when a batch is large.

    Raises:
        ValueError: it is such a model.
    """
    config = backbone.model.config
    why = ""
    if getattr(config, "attention_type", None) == "block_sparse":
        why = "has block-sparse attention (attention_type in its config), which changes with the longest row of a batch"
    elif hasattr(config, "num_landmarks") and hasattr(config, "segment_means_seq_len"):
        why = "attends through landmarks, which are means over a batch's full length, padding included"
    elif hasattr(config, "lsh_attn_chunk_length"):
        why = "attends within chunks of randomly hashed tokens"
    elif getattr(config, "expert_capacity", None) is not None and getattr(config, "num_experts", 1) > 1:
        why = "has experts of limited capacity, which drop tokens depending on the batch's other rows"
    if why:
        raise ValueError(
            f"{backbone.source} ({config.model_type}) {why}; a row's result would depend on its neighbors, so this "
            "model is refused: choose another backbone"
        )
