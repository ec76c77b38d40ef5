"""Token routing while a denoiser trains: half of the tokens skip the blocks in the middle.

Krause et al., "TREAD: Token Routing for Efficient Architecture-agnostic Diffusion Training", 2025.
Tokens that skip arrive unchanged behind the last routed block. What comes out is a plain network;
the last part of a training runs unrouted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn


class Routing:
    """Hooks on some successive blocks of a WanTransformer3DModel; they act while `active`.

    The tokens that pass through are drawn for each call, the same for the whole batch.
    """

    def __init__(self, blocks: list[nn.Module], generator: Generator) -> None:
        self.generator, self.active = generator, False
        self.kept = self.waiting = torch.empty(0)
        for place, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, place == 0))
        blocks[-1].register_forward_hook(self._leave)

    def _enter(self, first: bool, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Arguments of a routed block: states (batch, tokens, width), text, time, rotary tables."""
        if not self.active:
            return None
        states, text, time, tables = args
        if first:
            self.waiting, count = states, states.shape[1]
            self.kept = torch.randperm(count, generator=self.generator)[: count // 2]
            self.kept = self.kept.to(states.device)
            states = states[:, self.kept]
        return states, text, time, tuple(table[:, self.kept] for table in tables)

    def _leave(self, _: nn.Module, args: tuple[Any, ...], states: Tensor) -> Tensor | None:
        """After the last one: every token is there again."""
        if not self.active:
            return None
        return self.waiting.index_copy(1, self.kept, states)
