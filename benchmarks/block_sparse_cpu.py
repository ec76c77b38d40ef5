"""Block-sparse attention on a CPU against dense attention: what sparsity gains there.

    python benchmarks/block_sparse_cpu.py benchmarks/results/block-sparse-cpu.json

Dense and sparse calls alternate; every row is the median of their ratios.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from accel.kernels.block_sparse_attention import block_sparse_attention

TOKENS, HEADS, REPEATS = 4096, 8, 9
SHAPES = [(dim, size) for dim in (64, 128) for size in (64, 128)]
SPARSITIES = (0.5, 0.8, 0.9)


def measure(dim: int, size: int, sparsity: float) -> dict[str, Any]:
    """One shape at one sparsity; every row keeps equally many random key blocks."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, TOKENS, dim, generator=generator).unbind()
    blocks = TOKENS // size
    kept = max(round((1 - sparsity) * blocks), 1)
    order = torch.rand(1, HEADS, blocks, blocks, generator=generator).argsort(-1)
    mask = order < kept
    ratios = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        scaled_dot_product_attention(query, key, value)
        between = time.perf_counter()
        block_sparse_attention(query, key, value, mask, block_size=size)
        ratios.append((between - began) / (time.perf_counter() - between))
    return {
        "head_dim": dim,
        "block_size": size,
        "sparsity": 1 - kept / blocks,
        "speedup": statistics.median(ratios[1:]),
        "speedup_spread": [min(ratios[1:]), max(ratios[1:])],
    }


def main() -> None:
    """Every shape and sparsity."""
    torch.set_num_threads(1)
    rows = [measure(*shape, sparsity) for shape in SHAPES for sparsity in SPARSITIES]
    for row in rows:
        print(row)
    about = {
        "command": " ".join(["python", *sys.argv]),
        "tokens": TOKENS,
        "heads": HEADS,
        "machine": f"{platform.machine()} CPU, one thread, fp32, other jobs beside",
        "torch": torch.__version__,
    }
    content = json.dumps({**about, "rows": rows}, indent=1)
    Path(sys.argv[1]).write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
