"""Token Merging: attention on fewer tokens, the most similar ones merged and copied back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.chain import parameters
from accel.denoiser import Denoiser
from accel.hooks import override
from accel.method import AccelError, Handle, check, is_count, is_number
from accel.sublayer import sublayers

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[Callable[["Tensor"], "Tensor"], Callable[["Tensor"], "Tensor"]]


@dataclass(frozen=True)
class TokenMerging:
    """Merge a share `ratio` of the tokens into similar ones before self-attention; copy them after.

    Bolya & Hoffman, "Token Merging for Fast Stable Diffusion" (ToMe), 2023. One token of every
    `stride` × `stride` cell is a destination, at a random place in the cell (the same for all rows
    of a batch; the first one when the batch is odd, because both guidance halves must agree). Every
    other token finds its most similar destination by cosine; the most similar ones are merged into
    their destinations' mean, and get its output. `cross` and `mlp` merge there too.
    `max_downsample`: U-Net layers at up to this many times fewer pixels a side take part.

    Differs: similarity is taken of the normalised input instead of the block's input. Random
    places have their own fixed seed. For U-Nets and transformers without rotary embeddings (merged
    tokens have no single position). Combines with caches of whole blocks; not with methods that
    skip the same layers. Nothing is held between steps.
    """

    slot: ClassVar[str] = "tokens"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"ratio": 0.25},
        {"ratio": 0.5},
        {"ratio": 0.75},
    )

    ratio: float = 0.5
    stride: int = 2
    max_downsample: int = 1
    cross: bool = False
    mlp: bool = False
    random: bool = True

    def __post_init__(self) -> None:
        check(is_count(self.stride, 2), self, "stride", "a whole number ≥ 2")
        most = 1 - 1 / self.stride**2
        ratio = is_number(self.ratio) and 0 <= self.ratio <= most
        check(ratio, self, "ratio", f"between 0 and {most:g} for this stride")
        check(is_count(self.max_downsample, 1), self, "max_downsample", "a whole number ≥ 1")
        for field in ("cross", "mlp", "random"):
            check(isinstance(getattr(self, field), bool), self, field, "True or False")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the self-attention layers; raises for models with rotary embeddings."""
        owner = type(denoiser.module).__name__
        if any("rotary" in name for block in denoiser.chain.blocks for name in parameters(block)):
            raise AccelError(
                f"TokenMerging needs attention without rotary embeddings; {owner} has them"
            )
        kinds = ["self", *(["cross"] if self.cross else []), *(["mlp"] if self.mlp else [])]
        layers = [each for each in sublayers(denoiser.chain, owner) if each.kind in kinds]
        if not layers:
            raise AccelError(f"TokenMerging needs attention layers; {owner} has none known")
        generator = torch.Generator().manual_seed(0)

        def restart() -> None:
            generator.manual_seed(0)

        denoiser.forgetting.append(restart)
        hook = partial(self._hook, denoiser, generator)
        hooked = [denoiser.follow(partial(hook, layer.modules[0])) for layer in layers]
        return Handle.together([Handle(lambda: denoiser.forgetting.remove(restart)), *hooked])

    def _hook(
        self, denoiser: Denoiser, generator: torch.Generator, module: Any
    ) -> Callable[[], None]:
        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            forward = denoiser.forward
            hidden = args[0] if args else kwargs["hidden_states"]
            if forward is None or self.ratio == 0:
                return original(*args, **kwargs)
            grid = denoiser.grid(forward.arguments)
            pair = None if grid is None else self.plan(hidden, grid, generator)
            if pair is None:
                return original(*args, **kwargs)
            merge, unmerge = pair
            if args:
                output = original(merge(hidden), *args[1:], **kwargs)
            else:
                output = original(**{**kwargs, "hidden_states": merge(hidden)})
            if isinstance(output, tuple):
                return (unmerge(output[0]), *output[1:])
            return unmerge(output)

        return override(module, {"__call__": call})

    def plan(
        self, hidden: Tensor, grid: tuple[int, int, int], generator: torch.Generator
    ) -> Pair | None:
        """(merge, unmerge) for (batch, tokens, channels); None where this layer takes no part."""
        tokens, (_, rows, columns) = hidden.shape[1], grid
        down = math.ceil(math.sqrt(max(rows * columns // tokens, 1)))
        rows, columns = math.ceil(rows / down), math.ceil(columns / down)
        if down > self.max_downsample or rows * columns != tokens:
            return None
        cells = (rows // self.stride) * (columns // self.stride)
        count = min(tokens - cells, int(tokens * self.ratio))
        if count <= 0 or cells == 0:
            return None
        chosen = self.destinations(rows, columns, len(hidden), generator)
        chosen = chosen.to(hidden.device, non_blocking=True)
        order = chosen.flatten().argsort(descending=True, stable=True)
        to, source = order[:cells], order[cells:]
        unit = torch.nn.functional.normalize(hidden.float(), dim=-1)
        closeness, partner = (unit[:, source] @ unit[:, to].transpose(1, 2)).max(-1)
        ranked = closeness.argsort(dim=-1, descending=True)
        merged, kept = ranked[:, :count], ranked[:, count:]
        target = partner.gather(1, merged)

        def pick(values: Tensor, places: Tensor) -> Tensor:
            return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

        def merge(values: Tensor) -> Tensor:
            sources, whole = values[:, source], values[:, to]
            wide = target.unsqueeze(-1).expand(-1, -1, values.shape[-1])
            mean = whole.scatter_reduce(1, wide, pick(sources, merged), "mean", include_self=True)
            return torch.cat([pick(sources, kept), mean], dim=1)

        def unmerge(values: Tensor) -> Tensor:
            rest, whole = values.split([kept.shape[1], cells], dim=1)
            result = values.new_empty(len(values), tokens, values.shape[-1])
            result[:, to] = whole
            for places, part in ((kept, rest), (merged, pick(whole, target))):
                spots = source[places].unsqueeze(-1).expand_as(part)
                result.scatter_(1, spots, part)
            return result

        return merge, unmerge

    def destinations(
        self, rows: int, columns: int, batch: int, generator: torch.Generator
    ) -> Tensor:
        """(rows, columns), True at one token of every whole cell."""
        down, across = rows // self.stride, columns // self.stride
        place = torch.zeros(down, across, dtype=torch.long)
        if self.random and batch % 2 == 0:
            place = torch.randint(self.stride**2, (down, across), generator=generator)
        cells = torch.nn.functional.one_hot(place, self.stride**2).bool()
        whole = cells.unflatten(-1, (self.stride, self.stride)).transpose(1, 2)
        chosen = torch.zeros(rows, columns, dtype=torch.bool)
        chosen[: down * self.stride, : across * self.stride] = whole.flatten(2).flatten(0, 1)
        return chosen
