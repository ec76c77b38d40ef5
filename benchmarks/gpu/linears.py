"""Time low-bit linear layers and the single-pass kernels on a CUDA device.

    python -m benchmarks.gpu.linears benchmarks/results/gpu-linears.json

For each layer of some models: torch's bfloat16, and each format by torchao and by this package,
with the error against fp32. For the single passes: their share of the bandwidth of a copy.
`--smoke` runs everything small on a CPU, where times mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch
from torch.nn import functional

from accel.generate import versions
from accel.kernels.linear import Linear, torchao_why_not
from accel.kernels.relative_l1 import mean_distance, mean_distance_reference
from accel.kernels.weighted_sum import weighted_sum, weighted_sum_reference
from benchmarks.gpu.timing import asked, milliseconds

LAYERS = {
    "FLUX attention projection": (4608, 3072, 3072),
    "FLUX feed-forward in": (4608, 3072, 12288),
    "FLUX feed-forward out": (4608, 12288, 3072),
    "Wan 14B projection, 480p": (32760, 5120, 5120),
    "Wan 14B feed-forward in, 480p": (32760, 5120, 13824),
}
"""(tokens, in_features, out_features)."""
ELEMENTS = 2**27


def layer(name: str, shape: tuple[int, int, int], device: str) -> dict[str, Any]:
    """One layer in every format and by every backend that serves it."""
    tokens, inputs, outputs = shape
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5
    exact = functional.linear(x[:256].float(), weight.float())
    usual = milliseconds(lambda: functional.linear(x, weight), device)
    rows: list[dict[str, Any]] = [{"by": "torch bf16", "milliseconds": usual}]
    for form in ("w8a8", "fp8", "int8", "int4"):
        for backend in ("torchao", "own"):
            reason = (
                torchao_why_not(form, x.device, explicit=True) if backend == "torchao" else None
            )
            row: dict[str, Any] = {"by": f"{form} {backend}", "reason": reason}
            if reason is None:
                small = Linear(form, backend=backend).quantised(weight)
                given = functional.linear(x[:256], small).float()
                row["relative_error"] = float((given - exact).norm() / exact.norm())
                taken = milliseconds(lambda small=small: functional.linear(x, small), device)  # type: ignore[misc]
                row |= {"milliseconds": taken, "speedup": usual / taken}
            rows.append(row)
    return {"layer": name, "shape": shape, "rows": rows}


def passes(count: int, device: str) -> list[dict[str, Any]]:
    """The distance of two tensors and the sum of three, against a copy of the same bytes."""
    tensors = list(torch.randn(3, count, device=device, dtype=torch.bfloat16))
    target = torch.empty_like(tensors[0])
    copy = 2 * 2 * count / milliseconds(lambda: target.copy_(tensors[0]), device)
    weights = (2.0, -1.5, 0.5)
    new, old = tensors[:2]
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "distance": (4, lambda: mean_distance(new, old, old)),
        "distance by torch": (4, lambda: mean_distance_reference(new, old, old)),
        "weighted sum": (8, lambda: weighted_sum(weights, tensors)),
        "weighted sum by torch": (8, lambda: weighted_sum_reference(weights, tensors)),
    }
    rows = []
    for name, (size, run) in runs.items():
        taken = milliseconds(run, device)
        share = size * count / taken / copy
        rows.append({"pass": name, "milliseconds": taken, "share_of_copy_bandwidth": share})
    return rows


def main() -> None:
    """Measure into the file."""
    path, device = asked(__doc__)
    smoke = device == "cpu"
    layers = {"smoke": (32, 128, 256)} if smoke else LAYERS
    result = {
        "command": f"python -m benchmarks.gpu.linears {path}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device if smoke else torch.cuda.get_device_name(),
        "versions": versions(),
        "layers": [layer(name, shape, device) for name, shape in layers.items()],
        "passes": passes(2**16 if smoke else ELEMENTS, device),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
