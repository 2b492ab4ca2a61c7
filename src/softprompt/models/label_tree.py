"""Log-probabilities of many candidates after the same text, in memory that does not grow with their number.

Candidates that begin with the same tokens share those: the distinct beginnings of all candidates are the nodes of a
prefix tree. A decoder runs the nodes as further tokens of each row under a mask in which a node sees its text and its
ancestors, at the position that it has in its candidate. The text's keys and values are read and never copied for a
candidate. A model that takes no such mask (ALiBi from a mask's columns) runs candidates as rows of their own, whose
text's keys and values are repeated one layer at a time.

Either way a pass has at most `MOST_LOGITS` logits and `MOST_TOKENS` tokens. With gradients, several passes keep nothing
but their scores and are computed again in the backward pass.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from softprompt.backbones import fsdp
from softprompt.backbones.kernels import attention
from softprompt.models.base import Candidates, PromptedModel
from softprompt.models.decode_state import DecodeState
from softprompt.models.padding import pad_batch
from softprompt.models.verify import remembered

MOST_LOGITS = 2**25
"""Logits of a pass: 128 MiB in float32, a few times that while their log-softmax is taken."""
MOST_TOKENS = 2**12
"""Tokens of a pass, where the vocabulary is so small that logits are not what fills memory."""
MOST_NODES = 2**10
"""Nodes of a pass: its mask has their square."""
MOST_COLUMNS = 2**15
"""Keys of a pass whose rows are candidates: their text's, repeated one layer at a time."""


@final
@dataclass(frozen=True)
class LabelTree:
    """The distinct prefixes of some candidates, parents before children."""

    tokens: tuple[int, ...]
    """Each node's last token."""
    parents: tuple[int, ...]
    """-1: a candidate's first token, whose parent is the text."""
    depths: tuple[int, ...]
    """From 0."""
    edges: tuple[tuple[int, int], ...]
    """What is scored, once each: a token after a node."""
    paths: tuple[tuple[int, ...], ...]
    """Each candidate's edges."""

    @classmethod
    def of(cls, candidates: Candidates) -> "LabelTree":
        """The prefixes that some candidate continues; a candidate's first token is no edge, its last one no node."""
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

    def scores(self, logits: Float[Tensor, "batch *place vocab"], *, tree: bool) -> Float[Tensor, "batch candidate"]:
        """Each candidate's sum of log-probabilities.

        Args:
            tree: the places of the logits are nodes; else candidates and their tokens.
        """
        device, (batch, vocab) = logits.device, (len(logits), logits.shape[-1])
        logits = logits.reshape(batch, -1, vocab)
        norms = logits.float().logsumexp(-1)
        if tree:
            at, next_ids = (torch.tensor(one, dtype=torch.long, device=device) for one in zip(*self.edges, strict=True))
            steps = [edge for path in self.paths for edge in path]
        else:
            longest = logits.shape[1] // len(self.paths)
            placed = [
                (row * longest + depth, self.edges[edge][1])
                for row, path in enumerate(self.paths)
                for depth, edge in enumerate(path)
            ]
            at, next_ids = (torch.tensor(one, dtype=torch.long, device=device) for one in zip(*placed, strict=True))
            steps = list(range(len(placed)))
        logp = logits[:, at, next_ids].float() - norms[:, at]
        owners = torch.tensor([which for which, path in enumerate(self.paths) for _ in path], device=device)
        return logp.new_zeros(batch, len(self.paths)).index_add(1, owners, logp[:, steps])

    def ancestors(self, device: torch.device) -> Tensor:
        """`[node, node]`, bool: which nodes each one sees, itself among them."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen.to(device)


class SharedLayer(CacheLayerMixin):
    """A layer's keys and values that a pass sees in front of its own, and adds nothing to.

    Args:
        times: how often each row of the text is repeated, for as long as the layer runs.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, times: int = 1) -> None:
        super().__init__()
        self.own_keys, self.own_values, self.times = keys, values, times
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:
        """Those of the text, repeated."""
        return self.own_keys if self.times == 1 else self.own_keys.repeat_interleave(self.times, 0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """The base class clears what is not there yet."""

    @property
    def values(self) -> Tensor:
        """Those of the text, repeated."""
        return self.own_values if self.times == 1 else self.own_values.repeat_interleave(self.times, 0)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        """As for keys."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **others: Any) -> tuple[Tensor, Tensor]:
        """The text's, then the given ones, which are not kept."""
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a pass sees, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of the text."""
        return int(self.own_keys.shape[2])

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def score_rest(prompted: PromptedModel, state: DecodeState, candidates: Candidates) -> Float[Tensor, "batch candidate"]:
    """Log-probability, float32, of all tokens but the first of each candidate, after what a decoder has read.

    Args:
        state: its logits are not looked at, its keys and values not changed; columns of the latter beyond its mask are
            not looked at either.
    """
    width = state.mask.shape[1]
    layers = [(layer.keys[:, :, :width], layer.values[:, :, :width]) for layer in state.cache.layers]
    tree = takes_tree(prompted)
    run = _tree_logits if tree else _row_logits

    def scores(rows: slice, part: Candidates) -> Tensor:
        index = None if state.rows is None else state.rows[rows]
        cut = state._replace(mask=state.mask[rows], next_position=state.next_position[rows], rows=index)
        own = [(keys[rows], values[rows]) for keys, values in layers]
        return LabelTree.of(part).scores(run(prompted, cut, own, part), tree=tree)

    return in_parts(scores, candidates, len(state.mask), prompted.backbone.model, None if tree else width)


def in_parts(
    scores: Callable[[slice, Candidates], Float[Tensor, "some part"]],
    candidates: Candidates,
    batch: int,
    model: Any,
    columns: int | None,
) -> Float[Tensor, "batch candidate"]:
    """`scores(rows, part of the candidates)` of them all, in passes of bounded memory.

    Args:
        columns: keys that each candidate repeats, where candidates are rows; none: they are a tree.
    """
    order = sorted(range(len(candidates)), key=lambda which: tuple(candidates[which]))
    tokens = max(min(MOST_LOGITS // model.config.get_text_config().vocab_size, MOST_TOKENS), 1)
    deepest = max(map(len, candidates)) - 1
    if fsdp.is_sharded(model):  # each pass is a meeting: all processes make as many, whatever rows they have
        rows, most = batch, fsdp.max_over_ranks(model, batch)
        columns = None if columns is None else fsdp.max_over_ranks(model, columns)
    else:
        rows = most = min(batch, max(tokens // deepest, 1))
    parts = _parts([candidates[which] for which in order], tokens // most, deepest, columns, MOST_COLUMNS // most)
    spans = [slice(start, start + rows) for start in range(0, batch, rows)]
    again = torch.is_grad_enabled() and len(parts) * len(spans) > 1
    found = []
    for span in spans:
        some = [checkpoint(scores, span, part, use_reentrant=False) if again else scores(span, part) for part in parts]
        found.append(torch.cat(some, 1))
    return torch.cat(found)[:, torch.tensor(order, device=found[0].device).argsort()]


def _parts(
    ordered: Candidates, tokens: int, deepest: int, columns: int | None, most_columns: int
) -> Sequence[Candidates]:
    """Neighbours in alphabetical order, which share the most: as many as `tokens` of a row allow, at least one."""
    if columns is not None:
        count = max(min(tokens // deepest, most_columns // (columns + deepest)), 1)
        return [ordered[start : start + count] for start in range(0, len(ordered), count)]
    parts: list[list[Sequence[int]]] = []
    nodes = 0
    for candidate in ordered:
        added = len(candidate) - 1
        if parts:
            shared = 0
            for one, other in zip(candidate[:-1], parts[-1][-1][:-1], strict=False):
                if one != other:
                    break
                shared += 1
            if nodes + added - shared <= min(tokens, MOST_NODES):
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
    """Logits after each node: the nodes are further tokens of each row, of which one sees its text and ancestors."""
    tree, device, batch = LabelTree.of(candidates), state.mask.device, len(state.mask)
    ids = torch.tensor(tree.tokens, device=device).expand(batch, -1)
    depths = torch.tensor(tree.depths, device=device)
    own = tree.ancestors(device).expand(batch, 1, -1, -1)
    seen = torch.cat([state.mask.bool()[:, None, None].expand(-1, -1, own.shape[2], -1), own], 3)
    embeds = prompted.shifted(state.prompts, state.rows, ids, state.next_position + depths)
    if prompted.backbone.model.config._attn_implementation == "eager":  # which adds its mask
        seen = torch.zeros(seen.shape, dtype=embeds.dtype, device=device).masked_fill(
            ~seen, torch.finfo(embeds.dtype).min
        )
    logits: Tensor = prompted.backbone.model(
        inputs_embeds=embeds,
        past_key_values=Cache(layers=[SharedLayer(keys, values) for keys, values in layers]),
        use_cache=True,
        attention_mask=seen,
        position_ids=state.mask.sum(1, keepdim=True) + depths,
    ).logits
    return logits


def _row_logits(
    prompted: PromptedModel,
    state: DecodeState,
    layers: Sequence[tuple[Tensor, Tensor]],
    candidates: Candidates,
) -> Float[Tensor, "batch candidate more vocab"]:
    """Logits after each token of each candidate but its last: every candidate is a row."""
    padded, real = pad_batch(candidates, state.mask.device)
    (count, longest), batch, model = padded.shape, len(state.mask), prompted.backbone.model
    ids, more = padded[:, :-1].repeat(batch, 1), real[:, :-1].repeat(batch, 1)
    mask = torch.cat([state.mask.repeat_interleave(count, 0), more], 1)
    depths = torch.arange(longest - 1, device=mask.device)
    index = None if state.rows is None else state.rows.repeat_interleave(count, 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, 1 - longest :]
    logits: Tensor = model(
        inputs_embeds=prompted.shifted(
            state.prompts, index, ids, state.next_position.repeat_interleave(count, 0) + depths
        ),
        past_key_values=Cache(layers=[SharedLayer(keys, values, count) for keys, values in layers]),
        use_cache=True,
        attention_mask=mask,
        **({"position_ids": positions} if _counts_positions(model) else {}),
    ).logits
    return logits.view(batch, count, *logits.shape[1:])


def takes_tree(prompted: PromptedModel) -> bool:
    """Whether the decoder gives under a tree's mask what it gives for each candidate alone; tried once a model."""
    model = prompted.backbone.model

    def find() -> bool:
        if model.config._attn_implementation not in (
            "sdpa",
            "eager",
            attention.ATTN_IMPLEMENTATION,
        ) or not _counts_positions(model):
            return False
        try:
            return _tree_is_exact(prompted)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError):  # its own code makes something else of such a mask
            return False

    return remembered(model, "label tree", find)


@torch.no_grad()
def _tree_is_exact(prompted: PromptedModel) -> bool:
    backbone = prompted.backbone
    size = len(backbone.model.get_input_embeddings().weight)
    a, b, c, d, e, f, g = (int(one) % size for one in torch.linspace(0.1 * size, 0.9 * size, 7).long())
    ids, mask = torch.tensor([[a, b, c, d], [a, e, f, b]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    candidates, cache = [(a, b, c, d), (a, b, e, d), (a, f, g, d), (g, c, b, d)], DynamicCache()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = prompted.shifted([], None, ids, positions)
    backbone.model(
        inputs_embeds=embeds, past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=positions
    )
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    state = DecodeState(cache, mask, embeds[:, :0], mask.sum(1, keepdim=True), [], None)
    tree = LabelTree.of(candidates)
    ours = _tree_logits(prompted, state, layers, candidates).float()
    rows = _row_logits(prompted, state, layers, candidates).float()
    at = {edge: (which, depth) for which, path in enumerate(tree.paths) for depth, edge in enumerate(path)}
    nodes = [node for node, _ in tree.edges]
    which, depth = zip(*(at[edge] for edge in range(len(tree.edges))), strict=True)
    insert_prompts = rows[:, list(which), list(depth)]
    gap = float((ours[:, nodes] - insert_prompts).norm() / insert_prompts.norm())
    return gap <= (1e-3 if backbone.dtype is torch.float32 else 0.1)


def _counts_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters
