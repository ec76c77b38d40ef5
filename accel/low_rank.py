"""Low-rank offsets of a frozen denoiser's weights that follow the guidance scale.

They are added to the weights while a run lasts, so that its calls cost what they did before. As
adapters of AGD (see `accel.adapters`) they are not the paper's: those stand beside the attention
layers and cost a part of the branch that they save.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from accel.adapter_hosts import fitting, shape_of
from accel.hooks import is_group_offloaded
from accel.method import AccelError, Handle

if TYPE_CHECKING:
    from accel.denoiser import Denoiser


@dataclass(frozen=True)
class LowRankConfig:
    """What a file of low-rank offsets is for.

    `hosts`: path of each linear or convolution layer in the denoiser and the shape of its weight.
    `scales`: guidance scales that they were trained for.
    """

    base: str
    hosts: dict[str, list[int]]
    rank: int = 16
    scales: tuple[float, float] = (1.0, 8.0)
    variant: str = "low_rank"


class Offset(nn.Module):
    """ΔW(u) = B·diag(u·(1 + p·v + q·v²))·A of one layer, with v = u − ½; B starts at zero.

    u is (ω − 1) over its largest value: guidance is linear in ω − 1 and nothing at ω = 1.
    """

    def __init__(self, shape: list[int], rank: int) -> None:
        super().__init__()
        outputs, *rest = shape
        inputs = math.prod(rest)
        rank = min(rank, outputs, inputs)
        self.down = nn.Parameter(torch.randn(rank, *rest) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.bend = nn.Parameter(torch.zeros(2, rank))

    def gates(self, share: Tensor) -> Tensor:
        """The diagonal for u: () or (b,) → (…, rank)."""
        share = share[..., None].to(self.bend)
        aside = share - 0.5
        return share * (1 + self.bend[0] * aside + self.bend[1] * aside.square())

    def change(self, share: Tensor) -> Tensor:
        """ΔW for one u, in the shape of the weight."""
        product = (self.up * self.gates(share)) @ self.down.flatten(1)
        return product.view(len(self.up), *self.down.shape[1:])

    def beside(self, host: Any, inputs: Tensor, share: Tensor) -> Tensor:
        """What ΔW adds to the output of its layer; u is () or one for each row of the inputs.

        Rows may be folded with what stands beside them (rows × frames): they come in order.
        """
        gates = self.gates(share).to(inputs)
        if gates.dim() == 2:
            gates = gates.repeat_interleave(len(inputs) // len(gates), 0)
        down, up = self.down.to(inputs), self.up.to(inputs)
        if isinstance(host, nn.Linear):
            middle = functional.linear(inputs, down)
            wide = gates.view(*gates.shape[:-1], *[1] * (middle.dim() - 2), gates.shape[-1])
            return functional.linear(middle * wide, up)
        middle = functional.conv2d(inputs, down, None, host.stride, host.padding, host.dilation)
        return functional.conv2d(middle * gates[..., None, None], up[:, :, None, None])


class LowRank(nn.Module):
    """The offsets of all hosts of one denoiser.

    `attach` adds them beside the layers at every call, differentiably and with a scale for each
    row. `serve` adds them to the weights from `begin` until a run is over.
    """

    def __init__(self, config: LowRankConfig) -> None:
        super().__init__()
        self.config = config
        self.offsets = nn.ModuleDict(
            {_key(path): Offset(shape, config.rank) for path, shape in config.hosts.items()}
        )
        self.guidance: Tensor | float = 1.0
        """Guidance scale ω of the calls to come, or one for each row (b,)."""
        self._served: dict[str, Any] = {}
        self._parts: list[nn.Module] = []
        self._moving = False
        self._undo: list[Callable[[], None]] = []

    @property
    def share(self) -> Tensor:
        """u of the guidance scale."""
        scale = torch.as_tensor(self.guidance, dtype=torch.float32)
        return (scale - 1) / (self.config.scales[1] - 1)

    def attach(self, denoiser: Any, names: tuple[str, ...] = ()) -> Handle:
        """Hook into the hosts; raises `AccelError` for another base."""
        hooks = [Handle(self._hook(path, host)) for path, host in self._hosts(denoiser).items()]
        return Handle.together(hooks)

    def serve(self, denoiser: Denoiser) -> Handle:
        """Be there for a patched denoiser's runs; raises `AccelError` for another base."""
        self._served = self._hosts(denoiser.module)
        self._parts = list(denoiser.module.modules())
        self._moving = is_group_offloaded(denoiser.module)
        return Handle.together([Handle(self.restore), denoiser.when_forgetting(self.restore)])

    def begin(self, scale: float) -> None:
        """A run at a guidance scale: its offsets go to the weights until the run is over.

        Where a weight is quantised or comes and goes (offloaded), its layer's output gets them.
        """
        if self._undo and scale == self.guidance:
            return
        self.restore()
        if any(getattr(part, "fused_projections", False) for part in self._parts):
            raise AccelError(
                "these adapters change the weights of to_q, to_k and to_v, of which "
                "fuse_qkv_projections made copies; pipe.unfuse_qkv_projections() first"
            )
        self.guidance = scale
        for path, host in self._served.items() if scale != 1 else ():
            if _is_plain(host.weight) and not self._moving:
                self._undo.append(_added(host.weight, self._offset(path).change(self.share)))
            else:
                self._undo.append(self._hook(path, host))

    def restore(self) -> None:
        """Give the denoiser its own weights back, bit for bit."""
        while self._undo:
            self._undo.pop()()

    @torch.no_grad()
    def take_over(self, known: LowRank) -> bool:
        """Go on from trained offsets; what these are wider keeps its zero start.

        False, and nothing done, if those are for another base or other scales, or are wider.
        """
        fits = replace(known.config, rank=self.config.rank) == self.config
        if not fits or known.config.rank > self.config.rank:
            return False
        for mine, theirs in zip(self.parameters(), known.parameters(), strict=True):
            mine[tuple(slice(count) for count in theirs.shape)] = theirs
        return True

    def _offset(self, path: str) -> Offset:
        return self.offsets[_key(path)]  # type: ignore[return-value]

    def _hook(self, path: str, host: Any) -> Callable[[], None]:
        offset = self._offset(path)

        def after(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + offset.beside(module, args[0], self.share.to(output.device))

        hook = host.register_forward_hook(after)
        return lambda: hook.remove()

    def _hosts(self, denoiser: Any) -> dict[str, Any]:
        known = self.config
        return fitting(denoiser, known.base, known.hosts, shape_of, "as its weight's shape")


def _key(path: str) -> str:
    return path.replace(".", ":")


def _is_plain(weight: Tensor) -> bool:
    plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    return plain and weight.element_size() > 1 and weight.device.type != "meta"


@torch.no_grad()
def _added(weight: Tensor, change: Tensor) -> Callable[[], None]:
    """Add to a weight where it lies; the undo copies it back from where it was kept."""
    kept = weight.clone()
    weight.copy_(kept.float() + change.to(weight.device))

    @torch.no_grad()
    def undo() -> None:
        weight.copy_(kept)

    return undo
