"""Texts as a tree that holds what they have in common at their beginning once, read in one pass.

The tokens of a tree stand in one row, each node's behind those of its parents. All layers but attention treat a token
by itself, so a token that many texts share is computed once. Attention takes place in *blocks*: the new tokens of some
texts of similar length are its queries, and their whole texts its keys. These are copied out of the row, and copied
again when the gradient is computed, so that no layer keeps copies.

In: texts, i.e. tuples of token ids. Out: rows of ids with their `Tree`, and an attention function for transformers. The
trainer reads its micro-batches so, the in-process engine the prompts of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

Ids = tuple[int, ...]
KEYS_PER_TOKEN = 16
"""Keys whose copying takes about as long as a token (assumed). A branch copies its text from the root on once more, so
it must save a token for so many keys. Replies that begin alike by chance save fewer."""
PASS = 64
"""Tokens that take about as long as what a micro-batch costs besides its tokens (assumed)."""
BLOCK_KEYS = 2**14
"""Most keys that a block copies, unless one text alone has more; `memory.arithmetic` counts them."""
SLACK = 2**14
"""Pairs of a query and a key that a block may compute for nothing, however small it is."""
FUSED: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
"""transformers' attention with torch's fused kernel."""
ATTENTION = "sdpa_of_a_tree"
"""Name of the attention function among transformers' own."""


@dataclass(frozen=True)
class Block:
    """Texts of similar length whose attention is computed at once. Indices count the tokens of the row."""

    queries: Tensor
    """Shape (texts, Q): the new tokens of each text, padded on the right with any index."""
    keys: Tensor
    """Shape (texts, P): all its tokens from the root on, padded likewise."""
    mask: Tensor | None
    """Shape (texts, 1, Q, P): the keys that a query attends to. None: all texts are new, and attention is causal."""

    def to(self, device: torch.device) -> "Block":
        mask = None if self.mask is None else self.mask.to(device)
        return Block(self.queries.to(device), self.keys.to(device), mask)


@dataclass(frozen=True)
class Tree:
    """How the T tokens of a row continue each other."""

    positions: Tensor
    """Shape (1, T): the position of each token in its text."""
    blocks: tuple[Block, ...]
    order: Tensor
    """Shape (T,): where each token stands among the queries of all blocks, flattened, one block behind the other."""

    def to(self, device: torch.device) -> "Tree":
        blocks = tuple(block.to(device) for block in self.blocks)
        return replace(self, positions=self.positions.to(device), blocks=blocks, order=self.order.to(device))


class InTree(NamedTuple):
    """Some texts as a tree."""

    texts: range
    """Which of the texts that were cut."""
    ids: Tensor
    """Shape (1, T)."""
    places: list[list[int]]
    """Of each text: where its tokens stand in the row."""
    tree: Tree


class _Node(NamedTuple):
    """Tokens that some texts have in common, behind those that more texts have in common."""

    above: int
    """Number of tokens before its own."""
    path: list[int]
    """Places of its text's tokens, from the root to its last one."""

    @property
    def new(self) -> int:
        return len(self.path) - self.above


def trees(texts: Sequence[Ids], budget: int) -> Iterator[InTree]:
    """Cut texts into trees of at most ``budget`` tokens; one text that is longer is a tree by itself. Largest first.

    The cut is the one that reads fewest tokens. A beginning that texts of two trees share is read in each.

    Args:
        texts: In lexicographic order, none of them the beginning of another. Then the texts of a branch are adjacent.
    """
    shared = _shared_lengths(texts)
    for part in _cut(texts, shared, budget):
        yield _in_tree(texts, shared, part)


def whole_tree(texts: Sequence[Ids]) -> InTree:
    """All texts as one tree. They may come in any order, and some of them may be equal or the beginnings of others."""
    leaves: list[Ids] = []
    leaf_of: dict[int, int] = {}
    # Whatever begins with a text precedes it in this order, without a gap.
    for index in sorted(range(len(texts)), key=texts.__getitem__, reverse=True):
        if not leaves or leaves[-1][: len(texts[index])] != texts[index]:
            leaves.append(texts[index])
        leaf_of[index] = len(leaves)
    leaves.reverse()
    found = _in_tree(leaves, _shared_lengths(leaves), range(len(leaves)))
    places = [found.places[-leaf_of[index]][: len(text)] for index, text in enumerate(texts)]
    return found._replace(texts=range(len(texts)), places=places)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Pad rows on the right with 0. No result depends on the padding, so any token or place will do."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)


# ---- the cut -----------------------------------------------------------------------------------------


def _shared_lengths(texts: Sequence[Ids]) -> list[int]:
    """How many of its first tokens each text shares with the one before it; what saves too little is not shared."""
    shared = [0, *(_common(one, other) for one, other in pairwise(texts))]
    todo = [(range(len(texts)), 0)]
    while todo:
        branch, above = todo.pop()
        length = min((shared[i] for i in branch[1:]), default=above)
        parts = list(_parts(branch, shared, length))
        if (length - above) * (len(parts) - 1) * KEYS_PER_TOKEN < length:
            for part in parts[1:]:
                shared[part[0]] = above
            length = above
        todo += [(part, length) for part in parts if len(part) > 1]
    return shared


def _common(one: Ids, other: Ids) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _parts(branch: range, shared: Sequence[int], length: int) -> Iterator[range]:
    """The branch cut where neighbours share no more than ``length`` tokens."""
    cuts = [branch[0], *(i for i in branch[1:] if shared[i] <= length), branch[-1] + 1]
    return (range(start, end) for start, end in pairwise(cuts))


def _cut(texts: Sequence[Ids], shared: Sequence[int], budget: int) -> list[range]:
    """The cut into neighbours that costs least, each part as many tokens as it reads and `PASS`."""
    best = [(0, 0, 0)]  # of the first texts: the cost, where their last part begins, and its tokens
    for end in range(1, len(texts) + 1):
        choices: list[tuple[int, int, int]] = []
        read = 0
        for start in range(end - 1, -1, -1):
            read += len(texts[start]) - (shared[start + 1] if start + 1 < end else 0)
            if read > budget and choices:
                break
            choices.append((best[start][0] + read + PASS, start, read))
        best.append(min(choices))
    parts, end = [], len(texts)
    while end:
        _, start, read = best[end]
        parts.append((read, range(start, end)))
        end = start
    return [part for _, part in sorted(parts, key=lambda part: -part[0])]


# ---- the tree ----------------------------------------------------------------------------------------


def _in_tree(texts: Sequence[Ids], shared: Sequence[int], part: range) -> InTree:
    ids: list[int] = []
    positions: list[int] = []
    places: dict[int, list[int]] = {}
    nodes: list[_Node] = []
    todo: list[tuple[range, list[int]]] = [(part, [])]
    while todo:
        branch, path = todo.pop()
        above, text = len(path), texts[branch[0]]
        end = min((shared[i] for i in branch[1:]), default=len(text))
        if end > above:
            path = [*path, *range(len(ids), len(ids) + end - above)]
            nodes.append(_Node(above, path))
            ids += text[above:end]
            positions += range(above, end)
        if len(branch) == 1:
            places[branch[0]] = path
        else:
            todo += [(child, path) for child in reversed(list(_parts(branch, shared, end)))]
    tree = Tree(torch.tensor([positions]), *_blocks(nodes, len(ids)))
    return InTree(part, torch.tensor([ids]), [places[index] for index in part], tree)


def _blocks(nodes: Sequence[_Node], tokens: int) -> tuple[tuple[Block, ...], Tensor]:
    """The blocks, and the order of the tokens in them."""
    blocks: list[Block] = []
    order, filled = torch.empty(tokens, dtype=torch.long), 0
    for part in _alike(sorted(nodes, key=lambda node: (node.above > 0, -len(node.path), node.above))):
        queries, keys = padded([node.path[node.above :] for node in part]), padded([node.path for node in part])
        mask = None
        if part[0].above:
            above = torch.tensor([node.above for node in part])[:, None, None, None]
            mask = torch.arange(keys.shape[1]) <= above + torch.arange(queries.shape[1])[:, None]
        for row, node in enumerate(part):
            order[node.path[node.above :]] = filled + row * queries.shape[1] + torch.arange(node.new)
        filled += queries.numel()
        blocks.append(Block(queries, keys, mask))
    return tuple(blocks), order


def _alike(nodes: Sequence[_Node]) -> Iterator[list[_Node]]:
    """Cut nodes, the longest texts first, so that no block is mostly padding or copies more than `BLOCK_KEYS` keys."""
    part = [nodes[0]]
    for node in nodes[1:]:
        more = [*part, node]
        keys = len(more) * len(part[0].path)
        computed = keys * max(one.new for one in more)
        needed = sum(one.new * len(one.path) for one in more)
        if keys > BLOCK_KEYS or computed > 2 * needed + SLACK or (node.above > 0) != (part[0].above > 0):
            yield part
            more = [node]
        part = more
    yield part


# ---- attention ---------------------------------------------------------------------------------------


def attend_in_trees(model: PreTrainedModel) -> bool:
    """Let the model's attention take a ``tree``; False where the model has attention of another kind."""
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    return True


def no_mask(device: torch.device) -> Tensor:
    """A mask for transformers where attention goes by a tree: it builds none, as one of 4 axes is taken as it is."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def read_tree(decoder: nn.Module, ids: Tensor, tree: Tree) -> Tensor:
    """The decoder's last hidden states, shape (1, T, d)."""
    mask = no_mask(ids.device)
    read = decoder(input_ids=ids, position_ids=tree.positions, attention_mask=mask, use_cache=False, tree=tree)
    hidden: Tensor = read.last_hidden_state
    return hidden


def keys_of_rows(cache: DynamicCache, places: Tensor) -> None:
    """Give each text a row of its own in the cache of a tree.

    Args:
        cache: Of plain layers, after a tree was read with it.
        places: Shape (rows, width): where each row's tokens stand in the tree.
    """

    def of_rows(states: Tensor) -> Tensor:
        return states[0].index_select(1, places.flatten()).unflatten(1, places.shape).transpose(0, 1)

    change_states(cache, of_rows)


class _States(Protocol):
    """A layer of a cache that keeps every token; both have the shape (rows, heads, tokens, size)."""

    keys: Tensor
    values: Tensor


def change_states(cache: DynamicCache, change: Callable[..., Tensor], *others: DynamicCache) -> None:
    """Put what ``change`` makes of the keys, and of the values, in their place.

    Args:
        cache: Of plain layers, as ``others``.
        change: Called with those of ``cache``, then with those of each other cache.
    """
    for of_layer in zip(*(cast(list[_States], one.layers) for one in (cache, *others)), strict=True):
        of_layer[0].keys = change(*(layer.keys for layer in of_layer))
        of_layer[0].values = change(*(layer.values for layer in of_layer))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree | None = None,
    **settings: object,
) -> tuple[Tensor, None]:
    """`FUSED`, and its shapes. With a tree the mask is not looked at."""
    if tree is None:
        return FUSED(module, query, key, value, attention_mask, **settings)
    flat = [states[0].transpose(0, 1) for states in (query, key, value)]
    of_block: Callable[..., Tensor] = _of_block
    if torch.is_grad_enabled():  # nothing is drawn: dropout is off
        of_block = partial(checkpoint, _of_block, use_reentrant=False, preserve_rng_state=False)
    found = [of_block(module, block, *flat, settings) for block in tree.blocks]
    return torch.cat(found).index_select(0, tree.order)[None], None


def _of_block(
    module: nn.Module, block: Block, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, object]
) -> Tensor:
    """The output of a block's queries, shape (texts * Q, heads, d). The states have shape (T, heads, d).

    `index_select` copies them: the gradient of indexing with a tensor is summed in a different order each time on
    several CPU threads, so that a continued run would not be bit-equal.
    """

    def of(states: Tensor, places: Tensor) -> Tensor:
        return states.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)

    q, k, v = of(query, block.queries), of(key, block.keys), of(value, block.keys)
    output, _ = FUSED(module, q, k, v, block.mask, **settings)
    return output.flatten(0, 1)
