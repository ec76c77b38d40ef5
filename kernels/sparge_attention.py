"""SpargeAttn: blocks of keys by pooled scores, and dense where a block cannot be pooled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import normalize

from accel.attention_calls import AttentionCall
from accel.denoiser import Denoiser
from accel.kernels.attention_inputs import repeat_heads, softmax_scale
from accel.kernels.nabla import smallest_sets
from accel.kernels.sparse_blocks import attach_sparse, block_means, check_sparse
from accel.kernels.token_tiles import Grid
from accel.method import Handle, check, is_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SpargeAttention:
    """Attend to the key blocks with the largest pooled scores; blocks of unlike tokens stay dense.

    Zhang et al., "SpargeAttn", ICML 2025, first filter. Queries and keys are averaged over blocks;
    a row keeps the `topk` share of key blocks with the largest scores or, when `mass` is given,
    the smallest set with that share of the softmax. A block whose mean pairwise cosine similarity
    is below `similarity` has no meaningful average: as a block of queries it attends to everything,
    as a block of keys everything attends to it.

    Differs: the second filter (skipping PV products inside the kernel) is not built, both kinds of
    blocks have one size, tokens are put in space-time tiles, and nothing is tuned per head. Text,
    masks, `tile`, `warmup` and `least` as in `NABLA`. Each row of a batch and head has its own
    blocks. Holds nothing.
    """

    slot: ClassVar[str] = "attention"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({"topk": 0.7}, {}, {"topk": 0.3})

    topk: float = 0.5
    mass: float | None = None
    similarity: float = -0.1
    tile: Grid = (1, 8, 8)
    warmup: float = 0.0
    least: int = 2048

    def __post_init__(self) -> None:
        check(is_number(self.topk) and 0 < self.topk <= 1, self, "topk", "a number in (0, 1]")
        share = self.mass is None or (is_number(self.mass) and 0 < self.mass <= 1)
        check(share, self, "mass", "None or a number in (0, 1]")
        cosine = is_number(self.similarity) and -1 <= self.similarity <= 1
        check(cosine, self, "similarity", "a cosine between -1 and 1")
        check_sparse(self)

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the self-attention of all blocks."""
        return attach_sparse(self, denoiser, self._choose)

    def _choose(self, call: AttentionCall, grid: Grid, text: int) -> Tensor:
        size, heads = math.prod(self.tile), call.query.shape[1]
        keys = repeat_heads(call.key, heads)
        scores = block_means(call.query, size) @ block_means(keys, size).mT
        unlike = [likeness(each, size) < self.similarity for each in (call.query, keys)]
        scores = scores.masked_fill(unlike[1][:, :, None], -math.inf)  # kept anyway
        if self.mass is None:
            count = max(round(self.topk * scores.shape[-1]), 1)
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept.scatter_(-1, scores.topk(count, -1).indices, True)
        else:
            shares = (scores * softmax_scale(call.query, call.scale)).softmax(-1)
            kept = smallest_sets(shares.nan_to_num(), self.mass)
        return kept | unlike[0][..., None] | unlike[1][:, :, None]


def likeness(tensor: Tensor, size: int) -> Tensor:
    """Mean cosine similarity of all pairs of tokens of each block, (batch, heads, blocks)."""
    found: Tensor = block_means(normalize(tensor.float(), dim=-1), size).square().sum(-1)
    return found
