"""Compile every shipped kernel for every supported GPU, without a GPU, and report what came out.

python tools/compile_kernels.py            # table on stdout; exit 1 when a limit is broken
python tools/compile_kernels.py --write    # also renew the table in docs/kernels.md
python tools/compile_kernels.py --only sage --arch 90
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has nothing to compile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from accel.kernels.attention_softmax_triton import tile
from accel.kernels.block_sparse_attention_triton import block_sparse_forward, launch_shape
from accel.kernels.flash_attention_triton import TILES as FLASH_TILES
from accel.kernels.flash_attention_triton import flash_forward
from accel.kernels.linear_w8a8_triton import LARGE, SMALL, multiply, quantise_rows
from accel.kernels.relative_l1_triton import BLOCK as DISTANCE_BLOCK
from accel.kernels.relative_l1_triton import distance_sums
from accel.kernels.sage_attention_quantise import QUERY_BLOCK
from accel.kernels.sage_attention_quantise_triton import round_e4m3_transposed, round_int8
from accel.kernels.sage_attention_triton import TILES as SAGE_TILES
from accel.kernels.sage_attention_triton import sage_forward, sums_in_fp16
from accel.kernels.weighted_sum_triton import BLOCK as SUM_BLOCK
from accel.kernels.weighted_sum_triton import scaled_sum

ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMIT_KB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- compiled:begin -->", "<!-- compiled:end -->"
# Not multiples of 16 in general: the launcher will not promise it to the compiler.
UNALIGNED = {"heads", "group", "queries", "keys", "tokens", "key_blocks"} | {
    *("mask_batch", "mask_head", "bias_batch", "bias_head", "bias_block", "mean_row", "mean_block"),
}


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments and its compile-time settings, for one GPU."""

    name: str
    arch: int
    kernel: Any
    types: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    warps: int
    stages: int
    product: str = ""
    """Matrix instructions that must appear, as `IMMA+HMMA`; the sm_90 forms are IGMMA and so on."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case."""

    case: Case
    registers: int
    spilled: int
    shared_kb: float
    kinds: tuple[str, ...]

    def problems(self) -> list[str]:
        """The broken limits."""
        limit = SHARED_LIMIT_KB[self.case.arch]
        needed = self.case.product.split("+") if self.case.product else []
        if self.case.arch == 90:
            needed = [kind.replace("MMA", "GMMA") for kind in needed]
        return [
            *([f"{self.spilled} bytes spilled"] if self.spilled else []),
            *([f"{self.shared_kb} KB shared, limit {limit}"] if self.shared_kb > limit else []),
            *(f"no {kind}" for kind in needed if kind not in self.kinds),
        ]


def compile_case(case: Case) -> Compiled:
    """Compile by Triton's own ptxas and read the cubin."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "i32") for name in names}
    signature |= dict.fromkeys(case.constants, "constexpr")
    aligned = [
        place
        for index, name in enumerate(names)
        for place, kind in _places(index, signature[name])
        if name not in UNALIGNED and (kind == "i32" or kind[0] == "*")
    ]
    source = ASTSource(
        case.kernel,
        signature,
        case.constants,
        {place: [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    registers, spilled = _resources(built.asm["cubin"])
    kinds = _kinds(built.asm["cubin"])
    return Compiled(case, registers, spilled, round(built.metadata.shared / 1024, 1), kinds)


def _places(index: int, kind: str | tuple[str, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Where each tensor or number of an argument stands, and its type."""
    if isinstance(kind, str):
        yield (index,), kind
    else:
        yield from (((index, inner), each) for inner, each in enumerate(kind))


def _resources(cubin: bytes) -> tuple[int, int]:
    found = _cuobjdump(cubin, "--dump-resource-usage")
    registers, stack = (re.search(rf"{key}:(\d+)", found) for key in ("REG", "STACK"))
    assert registers and stack, found
    return int(registers[1]), int(stack[1])


def _kinds(cubin: bytes) -> tuple[str, ...]:
    listing = _cuobjdump(cubin, "-sass")
    wanted = re.findall(r"\b([HIQ]G?MMA|LDG\.E\.128|STG\.E\.128|UTMALDG|LDGSTS)\b", listing)
    return tuple(sorted(set(wanted)))


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def flash_cases(arch: int) -> Iterator[Case]:
    """Half-precision attention at every head_dim."""
    types = {**dict.fromkeys(("query", "key", "value", "output"), "*bf16"), "bias": "*fp32"}
    for dim in (64, 128, 256):
        shape = tile(FLASH_TILES, arch, dim)
        for causal in (False, True) if dim == 128 else (False,):
            yield Case(
                f"flash D{dim}{' causal' if causal else ''}",
                arch,
                flash_forward,
                {**types, "factor": "fp32"},
                {
                    **{"HEAD_DIM": dim, "BLOCK_D": dim, "BLOCK_M": shape.queries},
                    **{"BLOCK_N": shape.keys, "HAS_BIAS": False, "CAUSAL": causal},
                },
                shape.warps,
                shape.stages,
                "HMMA",
            )


def sage_cases(arch: int) -> Iterator[Case]:
    """INT8 scores with bf16 values, and with e4m3 values where the GPU has them."""
    scales = ("query_scale", "key_scale", "value_scale", "value_mean", "bias")
    types = {**dict.fromkeys(scales, "*fp32"), "query": "*i8", "key": "*i8", "output": "*bf16"}
    for fp8 in (False, True) if arch >= 89 else (False,):
        for dim in (64, 128, 256):
            shape = tile(SAGE_TILES[fp8], arch, dim)
            for bias in (False, True) if dim == 128 else (False,):
                yield Case(
                    f"sage {'int8+fp8' if fp8 else 'int8'} D{dim}{' bias' if bias else ''}",
                    arch,
                    sage_forward,
                    {**types, "value": "*fp8e4nv" if fp8 else "*bf16"},
                    {
                        **{"HEAD_DIM": dim, "BLOCK_D": dim, "BLOCK_M": shape.queries},
                        **{"BLOCK_N": shape.keys, "QUERY_BLOCK": QUERY_BLOCK, "HAS_BIAS": bias},
                        **{"HAS_MEAN": False, "CAUSAL": False, "FP8": fp8},
                        "FP16_SUM": fp8 and sums_in_fp16(arch),
                    },
                    shape.warps,
                    shape.stages,
                    "IMMA+QMMA" if fp8 else "IMMA+HMMA",
                )


def sparse_cases(arch: int) -> Iterator[Case]:
    """Block-sparse attention in half precision."""
    types = {**dict.fromkeys(("query", "key", "value", "output"), "*bf16"), "counts": "*i32"}
    for block, dim in ((64, 64), (64, 128), (128, 64), (128, 128)):
        keys, warps, stages = launch_shape(block, dim, 2, arch)
        yield Case(
            f"block-sparse {block} D{dim}",
            arch,
            block_sparse_forward,
            {**types, "listed": "*i32", "factor": "fp32"},
            {"HEAD_DIM": dim, "BLOCK_D": dim, "BLOCK": block, "BLOCK_N": keys},
            warps,
            stages,
            "HMMA",
        )


def rounding_cases(arch: int) -> Iterator[Case]:
    """What makes Q, K and V small."""
    types = {**dict.fromkeys(("mean", "bias", "scales"), "*fp32"), "source": "*bf16"}
    dims = {"HEAD_DIM": 128, "BLOCK_D": 128, "HAS_BIAS": False}
    for name, block, row in (("Q", 128, True), ("K", 64, False)):
        yield Case(
            f"round {name} D128",
            arch,
            round_int8,
            {**types, "rounded": "*i8", "factor": "fp32"},
            {**dims, "BLOCK": block, "PER_ROW": row, "HAS_MEAN": not row},
            4,
            2,
        )
    if arch >= 89:
        yield Case(
            "round V D128",
            arch,
            round_e4m3_transposed,
            {**types, "rounded": "*fp8e4nv"},
            {**dims, "BLOCK": 64, "HAS_MEAN": False},
            4,
            2,
        )


def layer_cases(arch: int) -> Iterator[Case]:
    """W8A8 linear layers, and the single passes of caches and forecasts."""
    types = {"rows": "*i8", "weight": "*i8", "bias": "*bf16", "output": "*bf16"}
    types |= {"row_scale": "*fp32", "scale": "*fp32"}
    for name, shape, product in (("w8a8", LARGE, "IMMA"), ("w8a8 few rows", SMALL, "")):
        tile_of = {key: shape[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
        yield Case(
            *(name, arch, multiply, types, {**tile_of, "HAS_BIAS": True}),
            *(shape["num_warps"], shape["num_stages"], product),
        )
    rows = {"rows": "*bf16", "quantised": "*i8", "scale": "*fp32"}
    yield Case("round rows", arch, quantise_rows, rows, {"BLOCK": 4096}, 4, 3)
    inputs = {**dict.fromkeys(("new", "old", "scale"), "*bf16"), "partial": "*fp32"}
    for size in ("none", "old", "other"):
        constants = {"SIZE": size, "BLOCK": DISTANCE_BLOCK}
        yield Case(f"distance, scale {size}", arch, distance_sums, inputs, constants, 8, 3)
    terms = {"tensors": ("*bf16",) * 3, "weights": ("fp32",) * 3, "output": "*bf16"}
    yield Case("sum of 3", arch, scaled_sum, terms, {"BLOCK": SUM_BLOCK}, 8, 3)


def cases(arch: int) -> list[Case]:
    """Everything shipped for one GPU."""
    return [
        *flash_cases(arch),
        *sage_cases(arch),
        *sparse_cases(arch),
        *rounding_cases(arch),
        *layer_cases(arch),
    ]


def table(results: list[Compiled]) -> str:
    """Markdown: a row a kernel and GPU."""
    lines = [
        f"Triton {triton.__version__}, its own ptxas; no GPU was used.",
        "",
        "| kernel | sm | warps, stages | registers | spilled bytes | shared KB | matrix products |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results:
        case = found.case
        products = " ".join(kind for kind in found.kinds if "MMA" in kind) or "–"
        lines.append(
            f"| {case.name} | {case.arch} | {case.warps}, {case.stages} | {found.registers} | "
            f"{found.spilled} | {found.shared_kb} | {products} |"
        )
    return "\n".join(lines)


def write(text: str) -> None:
    """Put the table between its marks in docs/kernels.md."""
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> int:
    """Compile what was asked for; 1 when a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="one GPU generation")
    parser.add_argument("--write", action="store_true", help="renew docs/kernels.md")
    asked = parser.parse_args()
    architectures = (asked.arch,) if asked.arch else ARCHITECTURES
    wanted = [case for arch in architectures for case in cases(arch) if asked.only in case.name]
    results = [compile_case(case) for case in wanted]
    print(table(results))
    broken = [(found.case, problem) for found in results for problem in found.problems()]
    for case, problem in broken:
        print(f"{case.name} on sm_{case.arch}: {problem}", file=sys.stderr)
    if asked.write:
        write(table(results))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
