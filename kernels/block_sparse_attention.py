"""Exact attention over chosen blocks of keys: what NABLA, SpargeAttn, Radial and SVG masks need.

Every (batch, head, block of queries) has its own list of key blocks. In Triton one program walks
one list. The reference gathers the listed blocks and runs dense attention on them, rows of equal
length together, so that on a CPU the time falls with the share of blocks kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from accel.kernels.attention_inputs import check_inputs, softmax_scale, to_heads_first, why_not
from accel.method import AccelError

_GATHERED_ELEMENTS = 2**21
"""Keys and values gathered at once: more falls out of the processor's cache."""


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
    layout: str = "HND",
) -> Tensor:
    """Attention of each block of `block_size` queries to the blocks of keys that its row keeps.

    Tensors as `flash_attention`. `block_mask` is bool, (batch or 1, heads or 1, query blocks, key
    blocks), blocks counted with the last, shorter one. A row that keeps nothing gives 0.
    """
    query, key, value = to_heads_first(layout, query, key, value)
    check_inputs(query, key, value)
    check_block_mask(block_mask, query, key, block_size)
    if why_not(query) is None:
        from accel.kernels.block_sparse_attention_triton import block_sparse_triton as attend
    else:
        attend = block_sparse_reference
    with torch.cuda.device_of(query):  # Triton launches on the current device
        output = attend(query, key, value, block_mask, block_size=block_size, scale=scale)
    return to_heads_first(layout, output)[0]


def check_block_mask(block_mask: Tensor, query: Tensor, key: Tensor, block_size: int) -> None:
    """Raise `AccelError` unless the mask fits the tensors."""
    if block_size not in (16, 32, 64, 128):
        raise AccelError(f"block_size={block_size!r}: accepted are 16, 32, 64 and 128")
    batch, heads = query.shape[:2]
    blocks = tuple(-(-x.shape[2] // block_size) for x in (query, key))
    shape = tuple(block_mask.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
    if not fits or shape[2:] != blocks or block_mask.dtype != torch.bool:
        raise AccelError(
            f"block_mask {block_mask.dtype} {shape}: must be bool ({batch} or 1, {heads} or 1, "
            f"{blocks[0]}, {blocks[1]})"
        )


def block_lists(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each row keeps, and which, ascending: int32 (…, rows), (…, rows, blocks).

    Entries past a row's count are the blocks it leaves out.
    """
    order = torch.argsort(block_mask, dim=-1, descending=True, stable=True)
    return block_mask.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)


def block_sparse_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    *,
    block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """The listed key blocks gathered, then dense attention; heads first."""
    batch, heads, queries, dim = query.shape
    scale = softmax_scale(query, scale)
    counts, listed = block_lists(block_mask.expand(batch, heads, -1, -1))
    counts, listed = counts.flatten(), listed.flatten(0, 2)
    query_blocks = _in_blocks(query, block_size).flatten(0, 2)
    key_blocks, value_blocks = (_in_blocks(x, block_size).flatten(0, 2) for x in (key, value))
    # The last block may be short: rows that list it attend to fewer keys than the others.
    last, missing = block_mask.shape[3] - 1, -key.shape[2] % block_size
    ends_short = block_mask[..., -1].expand(batch, heads, -1).flatten() & (missing > 0)
    row_head = torch.arange(batch * heads, device=query.device) // (heads // key.shape[1])
    first = (row_head * (last + 1)).repeat_interleave(block_mask.shape[2])
    output = torch.zeros_like(query_blocks)
    for count, short in torch.stack((counts, ends_short), dim=1).unique(dim=0).tolist():
        if count == 0:
            continue
        rows = ((counts == count) & (ends_short == bool(short))).nonzero().flatten()
        for some in rows.split(max(1, _GATHERED_ELEMENTS // (2 * count * block_size * dim))):
            wanted = first[some, None] + listed[some, :count]
            kept = slice(0, count * block_size - (missing if short else 0))
            keys, values = (
                x[wanted].flatten(1, 2)[None, :, kept] for x in (key_blocks, value_blocks)
            )
            output[some] = scaled_dot_product_attention(
                query_blocks[some][None], keys, values, scale=scale
            )[0]
    return output.view(batch, heads, -1, dim)[:, :, :queries]


def _in_blocks(tensor: Tensor, block_size: int) -> Tensor:
    """(batch, heads, tokens, dim) as (batch, heads, blocks, block_size, dim), zeros at the end."""
    return pad(tensor, (0, 0, 0, -tensor.shape[2] % block_size)).unflatten(2, (-1, block_size))  # type: ignore[no-any-return]
