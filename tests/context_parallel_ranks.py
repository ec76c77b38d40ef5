"""Run by torchrun in 2 processes: caches on a sequence that the ranks share.

Each rank compares with its own run on the whole sequence, and its verdicts with the other rank's.
A rank that decided alone would wait for the other for ever: the group's timeout turns that into an
error.
"""

import datetime
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

sys.path.insert(0, str(Path(__file__).parent))
from tiny_pipelines import TINY, run

import accel
from accel.caches.approximators import HoldResidual

METHODS = (
    accel.PlainCycle(interval=2),
    accel.FirstBlockCache(threshold=0.6),
    accel.TeaCache(threshold=0.5),
    accel.EasyCache(threshold=0.5, warmup=2),
    accel.DiCache(),
    accel.AdaCache(),
    accel.TaylorSeer(interval=3),
)


@dataclass(frozen=True)
class Quarrel:
    """Rank 0 always wants to skip, rank 1 never."""

    slot: ClassVar[str] = "model"
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def attach(self, denoiser):
        return denoiser.cache(lambda branch: self, HoldResidual())

    def skip(self, context, signals) -> bool:
        return dist.get_rank() == 0

    def computed(self, context, signals, site) -> None:
        pass


def verdicts(pipe: Any, tiny: Any, method: Any) -> tuple[torch.Tensor, dict[str, str], float]:
    """Latents, verdicts and share of the second run (the first measures)."""
    with accel.patched(pipe, method) as patch:
        run(tiny)
        latents = run(tiny)
        return latents, patch.report().verdicts, patch.report().share_computed


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it; a CPU has 0
    torch.set_num_threads(1)
    for family in ("flux", "wan21"):
        tiny = TINY[family]()
        alone = {method: verdicts(tiny.pipe, tiny, method) for method in METHODS}
        tiny.pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        skipped = 0
        for method in (*METHODS, Quarrel()):
            latents, seen, share = verdicts(tiny.pipe, tiny, method)
            both: list[Any] = [None, None]
            dist.all_gather_object(both, seen)
            assert both[0] == both[1], (family, method, both)
            if method in alone:
                assert seen == alone[method][1], (family, method, seen, alone[method][1])
                assert torch.allclose(latents, alone[method][0], atol=1e-4), (family, method)
                skipped += share < 1
            else:
                assert share == 1.0, (family, method, share)
        assert skipped >= 5, (family, skipped)
    print("agreed", flush=True)
    dist.barrier()  # no rank takes its connections down while the other still uses them
    # A thread of gloo that lets go of its last tensor while Python shuts down ends the process
    # ("terminate called without an active exception"): leave without a shutdown.
    os._exit(0)


if __name__ == "__main__":
    main()
