"""What a run did: computed or reused per step and branch, seconds, memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Verdict = Literal["computed", "reused", "extrapolated", "left out"]
_LETTERS = {"computed": "C", "reused": "R", "extrapolated": "E", "left out": "-"}
assert set(_LETTERS) == set(get_args(Verdict))


@dataclass(frozen=True)
class StepRow:
    """One denoiser call. `seconds` is host time; on CUDA it does not wait for the device.

    Methods that skip layers inside blocks count those layers instead of blocks, and a layer that
    ran for some tokens as their share. `called`: whether the denoiser ran at all, be it with all
    blocks skipped.
    """

    denoiser: str
    branch: str
    step: int
    verdict: str
    seconds: float
    blocks_run: float
    blocks: int
    called: bool = True


@dataclass(frozen=True)
class Report:
    """The last run of a patched pipeline.

    `memory_bytes` is the most that the feature caches of all sites held at once (not the one or two
    predictions of a guidance policy, nor `TextCache`); `repaired` counts stand-ins that the guard
    refused.
    """

    methods: tuple[str, ...]
    rows: tuple[StepRow, ...]
    memory_bytes: int
    repaired: int = 0

    @property
    def share_computed(self) -> float:
        """Blocks executed over blocks that an untouched run executes; 1.0 before any run."""
        possible = sum(row.blocks for row in self.rows)
        return sum(row.blocks_run for row in self.rows) / possible if possible else 1.0

    @property
    def hit_rate(self) -> float:
        """Share of the denoiser's blocks that were not executed."""
        return 1.0 - self.share_computed

    @property
    def seconds(self) -> float:
        """Host seconds inside the denoiser."""
        return sum(row.seconds for row in self.rows)

    @property
    def verdicts(self) -> dict[str, str]:
        """One letter a step for each denoiser and branch.

        C computed, R reused, E extrapolated, - left out.
        """
        strings: dict[str, str] = {}
        for row in self.rows:
            key = f"{row.denoiser}/{row.branch}"
            strings[key] = strings.get(key, "") + _LETTERS[row.verdict]
        return strings

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "methods": list(self.methods),
            "share_computed": self.share_computed,
            "hit_rate": self.hit_rate,
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "repaired": self.repaired,
            "verdicts": self.verdicts,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [
            f"methods         {', '.join(self.methods)}",
            f"share computed  {self.share_computed:.1%} of the blocks",
            f"denoiser time   {self.seconds:.3f} s in {len(self.rows)} calls",
            f"memory held     {self.memory_bytes / 2**20:.2f} MiB",
        ]
        lines += [f"{key:<15} {letters}" for key, letters in self.verdicts.items()]
        return "\n".join(lines)
