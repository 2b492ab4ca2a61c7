"""Log-probabilities of many candidates after the same text, in memory that does not grow with their number.

Candidates share the tokens that they begin with: the distinct prefixes of all candidates are the nodes of a prefix
tree. A decoder runs the nodes as further tokens of each row under a mask in which a node attends to its text and its
ancestors, at the position that it has in its candidate. The text's keys and values are never copied for a candidate. A
model that takes no such mask (ALiBi computed from a mask's columns) runs candidates as rows of their own, with the
text's keys and values repeated for one layer at a time.

Either way a pass has at most `MAX_LOGITS` logits and `MAX_TOKENS` tokens. With gradients, several passes keep nothing
but their scores, and run again in the backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from softprompt.backbones import fsdp
from softprompt.backbones.kernels import attention
from softprompt.models.base import PromptedModel
from softprompt.models.decode_state import DecodeState
from softprompt.models.inputs import Candidates
from softprompt.models.padding import pad_batch
from softprompt.models.verify import cached_check

MAX_LOGITS = 2**25
"""Most logits of a pass: 128 MiB in float32, a few times that during their log-softmax."""
MAX_TOKENS = 2**12
"""Most tokens of a pass; the limit where a small vocabulary keeps the logits small."""
MAX_NODES = 2**10
"""Most nodes of a pass; its mask has their square."""
MAX_COLUMNS = 2**15
"""Most keys of a pass whose rows are candidates; the text's are repeated for each."""


@final
@dataclass(frozen=True)
class LabelTree:
    """The distinct prefixes of candidates, parents before children."""

    tokens: tuple[int, ...]
    """Each node's last token."""
    parents: tuple[int, ...]
    """The parent of each node; -1, the text, for a candidate's first token."""
    depths: tuple[int, ...]
    """The depth of each node, from 0."""
    edges: tuple[tuple[int, int], ...]
    """Each scored step once: a node, and the token after it."""
    paths: tuple[tuple[int, ...], ...]
    """The edges of each candidate."""

    @classmethod
    def of(cls, candidates: Candidates) -> "LabelTree":
        """The tree of all prefixes that a candidate continues; its first token is not an edge, its last not a node."""
        nodes: dict[tuple[int, ...], int] = {}
        edges: dict[tuple[int, int], int] = {}
        parents, paths = [], []
        for candidate in candidates:
            path, parent = [], -1
            for end in range(1, len(candidate)):
                prefix = tuple(candidate[:end])
                if prefix not in nodes:
                    nodes[prefix] = len(nodes)
                    parents.append(parent)
                parent = nodes[prefix]
                path.append(edges.setdefault((parent, candidate[end]), len(edges)))
            paths.append(tuple(path))
        return cls(
            tuple(prefix[-1] for prefix in nodes),
            tuple(parents),
            tuple(len(prefix) - 1 for prefix in nodes),
            tuple(edges),
            tuple(paths),
        )

    def scores(self, logits: Float[Tensor, "batch *position vocab"], *, tree: bool) -> Float[Tensor, "batch candidate"]:
        """Each candidate's sum of log-probabilities.

        Args:
            tree: `position` is a node; else a candidate and its token.
        """
        device, (batch, vocab) = logits.device, (len(logits), logits.shape[-1])
        logits = logits.reshape(batch, -1, vocab)
        norms = logits.float().logsumexp(-1)
        if tree:
            pairs = list(self.edges)
            steps = [edge for path in self.paths for edge in path]  # of each path in turn: paths share edges
        else:
            longest = logits.shape[1] // len(self.paths)
            pairs = [
                (row * longest + depth, self.edges[edge][1])
                for row, path in enumerate(self.paths)
                for depth, edge in enumerate(path)
            ]
            steps = list(range(len(pairs)))
        at, next_ids = (torch.tensor(part, dtype=torch.long, device=device) for part in zip(*pairs, strict=True))
        logp = logits[:, at, next_ids].float() - norms[:, at]
        owners = torch.tensor([candidate for candidate, path in enumerate(self.paths) for _ in path], device=device)
        by_path = logp[:, torch.tensor(steps, device=device)]
        return logp.new_zeros(batch, len(self.paths)).index_add(1, owners, by_path)

    def ancestors(self, device: torch.device) -> Tensor:
        """`[node, node]`, bool: the nodes that each one attends to, itself among them."""
        visible = torch.eye(len(self.tokens), dtype=torch.bool, device="cpu")
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                visible[node] |= visible[parent]
        return visible.to(device)


class SharedLayer(CacheLayerMixin):
    """A layer's cached keys and values that passes attend to before their own, and never add to.

    Args:
        times: repetitions of each row of the text, made while the layer runs.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, times: int = 1) -> None:
        super().__init__()
        self.text_keys, self.text_values, self.times = keys, values, times
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:
        """The text's keys, repeated."""
        return self.text_keys if self.times == 1 else self.text_keys.repeat_interleave(self.times, 0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """Ignored: the base class assigns None."""

    @property
    def values(self) -> Tensor:
        """The text's values, repeated."""
        return self.text_values if self.times == 1 else self.text_values.repeat_interleave(self.times, 0)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        """Ignored: the base class assigns None."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the keys and values exist."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **others: Any) -> tuple[Tensor, Tensor]:
        """The text's keys and values, then the given ones, which are not stored."""
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a pass attends to, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of the text."""
        return int(self.text_keys.shape[2])

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def score_rest(prompted: PromptedModel, state: DecodeState, candidates: Candidates) -> Float[Tensor, "batch candidate"]:
    """Log-probability, float32, of all tokens but the first of each candidate, after the text of a decoder's state.

    Args:
        state: its logits are not used, nor columns of its cache beyond its mask; the cache is not changed.
    """
    width, tree = state.mask.shape[1], takes_tree(prompted)
    layers = [(layer.keys[:, :, :width], layer.values[:, :, :width]) for layer in state.cache.layers]
    run = _tree_logits if tree else _row_logits

    def scores(rows: slice, part: Candidates) -> Tensor:
        index = None if state.prompt_index is None else state.prompt_index[rows]
        row_state = state._replace(mask=state.mask[rows], next_position=state.next_position[rows], prompt_index=index)
        row_layers = [(keys[rows], values[rows]) for keys, values in layers]
        return LabelTree.of(part).scores(run(prompted, row_state, row_layers, part), tree=tree)

    return in_passes(scores, candidates, len(state.mask), prompted.backbone.model, None if tree else width)


def in_passes(
    scores: Callable[[slice, Candidates], Float[Tensor, "row part"]],
    candidates: Candidates,
    batch: int,
    model: Any,
    columns: int | None,
) -> Float[Tensor, "batch candidate"]:
    """`scores(rows, part of the candidates)` of all rows and candidates, in passes of bounded memory.

    Args:
        columns: keys that are repeated for each candidate, where candidates are rows; None: they are a tree.
    """
    order = sorted(range(len(candidates)), key=lambda number: tuple(candidates[number]))
    tokens = max(min(MAX_LOGITS // model.config.get_text_config().vocab_size, MAX_TOKENS), 1)
    deepest = max(map(len, candidates)) - 1
    if fsdp.is_sharded(model):  # every pass is a collective: all processes need the same number, whatever their rows
        rows, most = batch, fsdp.max_over_ranks(model, batch)
        columns = None if columns is None else fsdp.max_over_ranks(model, columns)
    else:
        rows = most = min(batch, max(tokens // deepest, 1))
    parts = _parts([candidates[number] for number in order], tokens // most, deepest, columns, MAX_COLUMNS // most)
    spans = [slice(start, start + rows) for start in range(0, batch, rows)]
    run_again = torch.is_grad_enabled() and len(parts) * len(spans) > 1
    by_span = []
    for span in spans:
        part_scores = [
            checkpoint(scores, span, part, use_reentrant=False) if run_again else scores(span, part) for part in parts
        ]
        by_span.append(torch.cat(part_scores, 1))
    return torch.cat(by_span)[:, torch.tensor(order, device=by_span[0].device).argsort()]


def _parts(
    ordered: Candidates, tokens: int, deepest: int, columns: int | None, max_columns: int
) -> Sequence[Candidates]:
    """The candidates in alphabetical order, whose neighbors share most, in parts of at most `tokens` per row."""
    if columns is not None:
        count = max(min(tokens // deepest, max_columns // (columns + deepest)), 1)
        return [ordered[start : start + count] for start in range(0, len(ordered), count)]
    parts: list[list[Sequence[int]]] = []
    nodes = 0
    for candidate in ordered:
        added = len(candidate) - 1
        if parts:
            pairs = zip(candidate[:-1], parts[-1][-1][:-1], strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if nodes + added - shared <= min(tokens, MAX_NODES):
                parts[-1].append(candidate)
                nodes += added - shared
                continue
        parts.append([candidate])
        nodes = added
    return parts


def _tree_logits(
    prompted: PromptedModel,
    state: DecodeState,
    layers: Sequence[tuple[Tensor, Tensor]],
    candidates: Candidates,
) -> Float[Tensor, "batch node vocab"]:
    """Logits after each node: the nodes are further tokens of each row, each attending to its text and ancestors."""
    tree, device, batch = LabelTree.of(candidates), state.mask.device, len(state.mask)
    ids = torch.tensor(tree.tokens, device=device).expand(batch, -1)
    depths = torch.tensor(tree.depths, device=device)
    ancestors = tree.ancestors(device).expand(batch, 1, -1, -1)
    mask = torch.cat([state.mask.bool()[:, None, None].expand(-1, -1, ancestors.shape[2], -1), ancestors], 3)
    embeds = prompted.token_embeddings(state.prompts, state.prompt_index, ids, state.next_position + depths)
    if prompted.backbone.model.config._attn_implementation == "eager":  # which adds its mask
        lowest = torch.finfo(embeds.dtype).min
        mask = torch.zeros(mask.shape, dtype=embeds.dtype, device=device).masked_fill(~mask, lowest)
    logits: Tensor = prompted.backbone.model(
        inputs_embeds=embeds,
        past_key_values=Cache(layers=[SharedLayer(keys, values) for keys, values in layers]),
        use_cache=True,
        attention_mask=mask,
        position_ids=state.mask.sum(1, keepdim=True) + depths,
    ).logits
    return logits


def _row_logits(
    prompted: PromptedModel,
    state: DecodeState,
    layers: Sequence[tuple[Tensor, Tensor]],
    candidates: Candidates,
) -> Float[Tensor, "batch candidate more vocab"]:
    """Logits after all tokens but the last of each candidate: every candidate is a row."""
    padded, real = pad_batch(candidates, state.mask.device)
    (count, longest), batch, model = padded.shape, len(state.mask), prompted.backbone.model
    ids, more = padded[:, :-1].repeat(batch, 1), real[:, :-1].repeat(batch, 1)
    mask = torch.cat([state.mask.repeat_interleave(count, 0), more], 1)
    depths = torch.arange(longest - 1, device=mask.device)
    index = None if state.prompt_index is None else state.prompt_index.repeat_interleave(count, 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, 1 - longest :]
    text_positions = state.next_position.repeat_interleave(count, 0) + depths
    logits: Tensor = model(
        inputs_embeds=prompted.token_embeddings(state.prompts, index, ids, text_positions),
        past_key_values=Cache(layers=[SharedLayer(keys, values, count) for keys, values in layers]),
        use_cache=True,
        attention_mask=mask,
        **({"position_ids": positions} if "position_ids" in prompted.backbone.forward_arguments else {}),
    ).logits
    return logits.view(batch, count, *logits.shape[1:])


def takes_tree(prompted: PromptedModel) -> bool:
    """Whether the decoder gives with a tree's mask what it gives for each candidate as a row; tried once per model."""
    model = prompted.backbone.model

    def check() -> bool:
        implementations = ("sdpa", "eager", attention.ATTN_IMPLEMENTATION)
        takes_positions = "position_ids" in prompted.backbone.forward_arguments
        if model.config._attn_implementation not in implementations or not takes_positions:
            return False
        try:
            return _tree_is_exact(prompted)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError):  # the model's own code rejects such a mask
            return False

    return cached_check(model, "label tree", check)


@torch.no_grad()
def _tree_is_exact(prompted: PromptedModel) -> bool:
    backbone = prompted.backbone
    size = len(backbone.model.get_input_embeddings().weight)
    spread = torch.linspace(0.1 * size, 0.9 * size, 7, device="cpu").long().tolist()
    a, b, c, d, e, f, g = (token % size for token in spread)
    ids = torch.tensor([[a, b, c, d], [a, e, f, b]], device=backbone.device)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=backbone.device)
    candidates, cache = [(a, b, c, d), (a, b, e, d), (a, f, g, d), (g, c, b, d)], DynamicCache()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = prompted.token_embeddings([], None, ids, positions)
    backbone.model(
        inputs_embeds=embeds, past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=positions
    )
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    state = DecodeState(cache, mask, embeds[:, :0], mask.sum(1, keepdim=True), [], None)
    tree = LabelTree.of(candidates)
    by_node = _tree_logits(prompted, state, layers, candidates).float()
    by_row = _row_logits(prompted, state, layers, candidates).float()
    at = {edge: (candidate, depth) for candidate, path in enumerate(tree.paths) for depth, edge in enumerate(path)}
    nodes = torch.tensor([node for node, _ in tree.edges], device=backbone.device)
    candidate, depth = torch.tensor([at[edge] for edge in range(len(tree.edges))], device=backbone.device).unbind(1)
    expected = by_row[:, candidate, depth]
    gap = float((by_node[:, nodes] - expected).norm() / expected.norm())
    return gap <= (1e-3 if backbone.dtype is torch.float32 else 0.1)
