"""Small networks beside a frozen denoiser's attention layers that make one branch do guidance.

Perez Jensen and Sadat, "Adapter Guidance Distillation" (AGD), 2025. `Adapters` are attached by
hooks: no module is replaced and no weight of the host is touched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from accel.adapter_hosts import fitting, width_of
from accel.family import ENCODER, HIDDEN, Arguments
from accel.hooks import is_compiled_whole
from accel.method import AccelError, Handle

if TYPE_CHECKING:
    from accel.denoiser import Denoiser


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter file is for.

    `hosts`: path of each attention layer in the denoiser and its channels. `scales`: guidance
    scales that it was trained for. `time_unit`: the denoiser's timestep argument at full noise.
    """

    variant: Literal["cross", "offset"]
    base: str
    hosts: dict[str, int]
    text_width: int
    width: int = 64
    scales: tuple[float, float] = (1.0, 8.0)
    time_unit: float = 1000.0


class ScalarEncoder(nn.Module):
    """LN(MLP(cos 2π(f·s + φ))) of scalars (b,) → (b, width); f and φ are fixed and saved."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int, spread: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", spread * torch.randn(width))
        self.register_buffer("phases", torch.rand(width))
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.LayerNorm(width)
        )

    def forward(self, scalars: Tensor) -> Tensor:
        """Encode scalars (b,) as (b, width)."""
        waves = torch.cos(2 * math.pi * (scalars[:, None] * self.frequencies + self.phases))
        encoded: Tensor = self.layers(waves)
        return encoded


class CrossHosts(nn.Module):
    """W_o·Attn(W_q x, W_k E, W_v E) for hosts of equal channels; W_o starts at zero.

    The products with E do not depend on x and are made once a forward for all hosts.
    """

    def __init__(self, hosts: int, channels: int, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(hosts, channels, width) * channels**-0.5)
        self.key = nn.Parameter(torch.randn(hosts, width, width) * width**-0.5)
        self.value = nn.Parameter(torch.randn(hosts, width, width) * width**-0.5)
        self.out = nn.Parameter(torch.zeros(hosts, width, channels))
        self.folded: tuple[Tensor, Tensor] | None = None

    def fold(self) -> tuple[Tensor, Tensor]:
        """W_q·W_kᵀ and W_v·W_o of every host, (hosts, 1, width, channels), without any input."""
        scores = self.query @ self.key.mT / self.key.shape[-1] ** 0.5
        return scores[:, None].mT, (self.value @ self.out)[:, None]

    def condition(self, tokens: Tensor) -> list[tuple[Tensor, ...]]:
        """For every host, from E (b, length, width): (b, channels, length) and its transpose's."""
        to_keys, to_values = self.folded or self.fold()
        return list(zip((tokens @ to_keys).mT, tokens @ to_values, strict=True))

    @staticmethod
    def apply_to(hidden: Tensor, condition: tuple[Tensor, ...]) -> Tensor:
        """What is added to a host's output for its input (b, tokens, channels)."""
        keys, values = condition
        return (hidden @ keys).softmax(-1) @ values


class OffsetHosts(nn.Module):
    """W_2·LN(ReLU(W_1 e)), one vector for all tokens, for equal channels; W_2 from zero."""

    def __init__(self, hosts: int, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(hosts, width, width) * (2 / width) ** 0.5)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Parameter(torch.zeros(hosts, width, channels))

    def condition(self, tokens: Tensor) -> list[tuple[Tensor, ...]]:
        """For every host, from E (b, length, width): (b, 1, channels)."""
        vector = tokens[:, 0] + tokens[:, 1] + tokens[:, 2:].mean(1)
        offsets = self.norm((vector @ self.first).relu()) @ self.out
        return [(offset[:, None],) for offset in offsets]

    @staticmethod
    def apply_to(hidden: Tensor, condition: tuple[Tensor, ...]) -> Tensor:
        """What is added to a host's output."""
        return condition[0]


class Adapters(nn.Module):
    """All adapters of one denoiser and the encoder of guidance scale, timestep and text they share.

    Differs from the paper: one encoder for all hosts and one of the timestep of its own, so that
    they run once a forward and need nothing of the host; and what is added is multiplied by
    (ω − 1) over its largest value, because guidance is linear in ω − 1 and nothing at ω = 1.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.scale_encoder = ScalarEncoder(width, spread=1.0)
        self.time_encoder = ScalarEncoder(width, spread=2.0)
        self.text = nn.Linear(config.text_width, width)
        kind = CrossHosts if config.variant == "cross" else OffsetHosts
        self.paths = _by_channels(config.hosts)
        self.groups = nn.ModuleDict(
            {str(size): kind(len(paths), size, width) for size, paths in self.paths.items()}
        )
        self.apply_to = kind.apply_to
        self.guidance: Tensor | float = 1.0
        """Guidance scale ω of the forwards to come, or one for each row (b,)."""
        self._conditions: dict[str, tuple[Tensor, ...]] = {}
        self._serve: Callable[[], Handle] | None = None
        self._served: Handle | None = None

    # --- the work of a forward -----------------------------------------------------------------

    def condition(self, timestep: Tensor, text: Tensor) -> None:
        """Encode what a forward is conditioned on: timestep () or (b,), text (b, length, width)."""
        if self.text.weight.device != text.device:  # the model was moved, or is offloaded
            self.to(text.device)
            self._refold()
        batch, like = len(text), self.text.weight
        text = text.to(like.dtype)
        scale = torch.as_tensor(self.guidance, device=like.device, dtype=like.dtype).expand(batch)
        time = timestep.to(like.device, like.dtype).expand(batch) / self.config.time_unit
        high = self.config.scales[1]
        scalars = (self.scale_encoder(scale / high), self.time_encoder(time))
        tokens = torch.cat((torch.stack(scalars, 1), self.text(text)), 1)
        tokens = tokens + _positions(tokens.shape[1], tokens.shape[2], tokens.device).to(tokens)
        gain = ((scale - 1) / (high - 1))[:, None, None]
        for size, paths in self.paths.items():
            found = self.groups[str(size)].condition(tokens)  # type: ignore[operator]
            for path, (*rest, last) in zip(paths, found, strict=True):
                self._conditions[path] = (*rest, last * gain)

    def add(self, path: str, hidden: Tensor, output: Any) -> Any:
        """A host's output with the adapter's, on the first stream where a host returns several."""
        first = output[0] if isinstance(output, tuple) else output
        condition = tuple(each.to(hidden.dtype) for each in self._conditions[path])
        first = first + self.apply_to(hidden, condition)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    # --- attaching -----------------------------------------------------------------------------

    def attach(self, denoiser: Any, names: tuple[str, ...]) -> Handle:
        """Hook into a denoiser whose forward takes arguments `names`; raises for another base."""
        known = self.config
        modules = fitting(denoiser, known.base, known.hosts, width_of, "channels")

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = Arguments(names, args, kwargs)
            self.condition(torch.as_tensor(arguments.get("timestep")), arguments.get(ENCODER))

        hooks = [denoiser.register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [
            module.register_forward_hook(_Addition(self, path), with_kwargs=True)
            for path, module in modules.items()
        ]

        def undo() -> None:
            for hook in hooks:
                hook.remove()
            self._conditions = {}

        return Handle(undo)

    def serve(self, denoiser: Denoiser) -> Handle:
        """Attach to a patched denoiser; the weights stay as they are, so their products do."""
        if is_compiled_whole(denoiser.module):
            raise AccelError(
                f"AGD hooks into attention layers, but {denoiser.name} was compiled as a whole; "
                f"use pipe.{denoiser.name}.compile_repeated_blocks() instead"
            )
        for group in self.groups.values():
            if isinstance(group, CrossHosts):
                group.folded = group.fold()
        self._serve = functools.partial(self.attach, denoiser.module, denoiser.names)
        self._serve().remove()  # raises for another base
        return Handle.together([Handle(self.restore), denoiser.when_forgetting(self.restore)])

    def _refold(self) -> None:
        for group in self.groups.values():
            if isinstance(group, CrossHosts) and group.folded is not None:
                group.folded = group.fold()

    def begin(self, scale: float) -> None:
        """A run at a guidance scale: the hosts are hooked until it is over."""
        self.guidance = scale
        if self._serve is not None and self._served is None:
            self._served = self._serve()

    def restore(self) -> None:
        """Let the denoiser be as it was."""
        if self._served is not None:
            self._served.remove()
            self._served = None


class _Addition:
    """The forward hook of one host."""

    def __init__(self, adapters: Adapters, path: str) -> None:
        self.adapters, self.path = adapters, path

    def __call__(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs[HIDDEN]
        return self.adapters.add(self.path, hidden, output)


def _by_channels(hosts: dict[str, int]) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for path, channels in hosts.items():
        groups.setdefault(channels, []).append(path)
    return groups


@functools.lru_cache(maxsize=8)
def _positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions with period 10000, (length, width)."""
    rates = 10000 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1)[:, :width]
