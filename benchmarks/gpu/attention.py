"""Time the attention kernels on a CUDA device, and compare them with fp32.

    python -m benchmarks.gpu.attention benchmarks/results/gpu-attention.json

For each shape: every kernel of `accel.kernels.attention_table` that runs here, with TFLOP/s, its
speed over the best exact backend of torch, its cosine and relative L1 against fp32 on inputs with
outliers, and why the others do not run; then block-sparse attention at several sparsities.
`--smoke` runs everything small on a CPU, where times mean nothing.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from accel.attention_calls import AttentionCall, AttentionLayer
from accel.generate import versions
from accel.kernels.attention_table import KERNELS
from accel.kernels.block_sparse_attention import block_sparse_attention
from benchmarks.gpu.timing import asked, milliseconds

SHAPES = {
    **{f"self, D64, N={n}": (24, n, n, 64) for n in (1024, 4096, 16384, 65536)},
    **{f"self, D128, N={n}": (24, n, n, 128) for n in (1024, 4096, 16384, 65536)},
    "FLUX 1024²": (24, 4608, 4608, 128),
    "Wan 14B 480p": (40, 32760, 32760, 128),
    "Wan 14B 480p, text": (40, 32760, 512, 128),
    "HunyuanVideo 720p": (24, 118800, 118800, 128),
    "CogVideoX 5B": (48, 17776, 17776, 64),
}
"""(heads, queries, keys, head_dim)."""
SPARSE = {"D64": (24, 32768, 64), "D128": (24, 32768, 128)}
"""(heads, tokens, head_dim)."""
TORCH = ("sdpa", "cudnn", "flash", "efficient")
JUDGED = 1024
"""Queries that are compared with fp32."""


def inputs(heads: int, queries: int, keys: int, dim: int, device: str) -> tuple[Tensor, ...]:
    """Normal values, and keys and values with a few large channels, as trained models have."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, n, dim, device=device) for n in (queries, keys, keys)
    )
    key[..., :4] += 8 * torch.randn(1, heads, 1, 4, device=device)
    value[..., -2:] *= 6
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return tuple(each.to(dtype) for each in (query, key, value))


def call_of(query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
    """As a model's layer calls it."""
    layer = AttentionLayer("benchmark", None)

    def plain() -> Tensor:
        return scaled_dot_product_attention(query, key, value)

    return AttentionCall(layer, query, key, value, None, False, None, plain)


def dense(name: str, shape: tuple[int, int, int, int], device: str) -> dict[str, Any]:
    """One shape by every kernel."""
    heads, queries, keys, dim = shape
    call = call_of(*inputs(*shape, device))
    some = [each.float() for each in (call.query[:, :, :JUDGED], call.key, call.value)]
    exact = scaled_dot_product_attention(*some)
    rows: list[dict[str, Any]] = []
    for kernel, found in KERNELS.items():
        reason = found.why_not(call.query)
        row: dict[str, Any] = {"kernel": kernel, "reason": reason}
        if reason is None and kernel != "math":
            try:
                made = found.run(call)[:, :, :JUDGED].float()
                taken = milliseconds(lambda found=found: found.run(call), device)  # type: ignore[misc]
            except (RuntimeError, ValueError) as error:
                row["reason"] = str(error)[:200]
            else:
                row |= {
                    "milliseconds": taken,
                    "tflops": 4e-9 * heads * queries * keys * dim / taken,
                    "cosine": float(cosine_similarity(made.flatten(), exact.flatten(), dim=0)),
                    "relative_l1": float((made - exact).abs().sum() / exact.abs().sum()),
                }
        rows.append(row)
    best = min(r["milliseconds"] for r in rows if r["kernel"] in TORCH and "milliseconds" in r)
    for row in rows:
        if "milliseconds" in row:
            row["over_best_of_torch"] = best / row["milliseconds"]
    return {"shape": name, "sizes": shape, "rows": rows}


def sparse(name: str, shape: tuple[int, int, int], device: str) -> list[dict[str, Any]]:
    """Block-sparse attention with random blocks against the best dense backend of torch."""
    heads, tokens, dim = shape
    call = call_of(*inputs(heads, tokens, tokens, dim, device))
    backends = [KERNELS[each] for each in TORCH]
    runnable = [each for each in backends if each.why_not(call.query) is None]
    usual = min(milliseconds(lambda each=each: each.run(call), device) for each in runnable)  # type: ignore[misc]
    rows = []
    for block in (64, 128):
        blocks = -(-tokens // block)
        order = torch.rand(1, heads, blocks, blocks, device=device).argsort(-1)
        for left_out in (0.5, 0.8, 0.9):
            mask = order < max(round((1 - left_out) * blocks), 1)

            def run(mask: Tensor = mask, block: int = block) -> Tensor:
                return block_sparse_attention(
                    call.query, call.key, call.value, mask, block_size=block
                )

            row = {"shape": name, "block": block, "sparsity": left_out}
            rows.append(row | {"over_best_of_torch": usual / milliseconds(run, device)})
    return rows


def main() -> None:
    """Measure into the file; it grows shape by shape."""
    path, device = asked(__doc__)
    smoke = device == "cpu"
    shapes = {"smoke": (2, 128, 128, 64)} if smoke else SHAPES
    sparse_shapes = {"smoke": (2, 512, 64)} if smoke else SPARSE
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.gpu.attention {path}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device if smoke else torch.cuda.get_device_name(),
        "versions": versions(),
        "dense": [],
        "sparse": [],
    }
    for name, shape in shapes.items():
        result["dense"].append(dense(name, shape, device))
        path.write_text(json.dumps(result, indent=1) + "\n")
    for name, sizes in sparse_shapes.items():
        result["sparse"] += sparse(name, sizes, device)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
