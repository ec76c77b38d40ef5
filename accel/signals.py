"""The tensors of one denoiser call that a policy or a forecast may look at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from accel.hooks import onload, parallel_group
from accel.method import AccelError
from accel.site import Forward, mean_change

if TYPE_CHECKING:
    from accel.denoiser import Denoiser


class SpanSignals:
    """What a policy may look at; see `accel.site.Signals`."""

    def __init__(self, denoiser: Denoiser, forward: Forward, hidden: Any) -> None:
        self._denoiser, self._forward = denoiser, forward
        self.hidden = hidden

    @property
    def entry(self) -> Any:
        """The chain's input in the layout of `hidden`."""
        if not self._forward.entry:
            raise AccelError("what looks at a probe of first blocks must skip a range of blocks")
        entry = self._denoiser.chain.relayout(self._forward.entry, self.hidden)[0]
        if entry is not None and entry.shape != self.hidden.shape:
            raise AccelError(
                f"the blocks before this span of {type(self._denoiser.module).__name__} change "
                "the shape of the hidden states; let it begin earlier"
            )
        return entry

    @property
    def observed(self) -> Any:
        """The tensor that the family's observer watches."""
        observer = self._denoiser.family.observer
        if observer is None:
            return self._forward.entry[0]
        block = self._denoiser.chain.blocks[0]
        onload(block)
        return observer(block, self._forward.entry_arguments)

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """Frames, rows and columns of the hidden states' tokens; None where they form no grid."""
        denoiser = self._denoiser
        grid = denoiser.grid(self._forward.arguments)
        cut = parallel_group(denoiser.module) is not None and self.hidden.dim() == 3
        if cut and self.hidden.shape[1] != math.prod(grid or ()):
            raise AccelError(
                "a method that looks at neighbouring tokens cannot run where context parallelism "
                "gives each rank a part of them; EasyCache, MagCache and TeaCache can"
            )
        return grid

    @property
    def maps(self) -> Any:
        """`hidden` as (…, channels, rows, columns); tokens of mixed sizes fill what they cover.

        Reference pictures behind the one that is made are left out.
        """
        hidden, grid = self.hidden, self.grid
        if hidden.dim() == 4:
            return hidden
        if grid is None:
            layout = self._denoiser.clock.staging.layout
            hidden, grid = hidden[:, layout.spread.to(hidden.device)], layout.full
        if self._denoiser.family.grid is not None:
            hidden = hidden[:, : math.prod(grid)]
        if hidden.shape[1] not in (math.prod(grid), grid[1] * grid[2]):
            raise AccelError(
                f"{type(self._denoiser.module).__name__}: where its {hidden.shape[1]} tokens lie "
                "in the picture is not known, which SeaCache needs"
            )
        return hidden.unflatten(1, (-1, grid[1], grid[2])).movedim(-1, -3)

    def relative_change(self, new: Any, old: Any) -> float:
        """mean|new − old| / mean|old|, the same on every rank."""
        return self.mean_change(new, old, old)

    def mean_change(self, new: Any, old: Any, scale: Any = None) -> float:
        """mean|new − old|, over mean|scale| when given, the same on every rank."""
        return mean_change(new, old, scale, parallel_group(self._denoiser.module))

    def agree(self, wanted: bool) -> bool:
        """Whether every rank wants it; asked by all ranks at the same places of a run."""
        group = parallel_group(self._denoiser.module)
        if group is None:
            return wanted
        votes = self.hidden.new_tensor(float(wanted))
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group=group)
        return bool(votes)
