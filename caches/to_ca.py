"""ToCa: between full steps, the tokens that matter most are computed afresh."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from accel.caches.approximators import HoldResidual
from accel.denoiser import Denoiser
from accel.guidance import is_doubled
from accel.method import AccelError, Handle, check, is_count, is_number
from accel.site import Branch, Computed, Policy, Signals, StepContext, Streams
from accel.sublayer import Sublayer, cache_sublayers, sublayers

if TYPE_CHECKING:
    from torch import Tensor

WAN_WORDS = 512
"""Length of the prompt behind the picture's tokens, as in diffusers' Wan."""
ROWS = 4096
"""Tokens whose attention to the text is held at once."""


@dataclass(frozen=True)
class ToCa:
    """Reuse attention outputs; recompute MLP and cross-attention outputs of chosen tokens.

    Zou et al., "Accelerating Diffusion Transformers with Token-wise Feature Caching", ICLR 2025.
    After `warmup` full steps every `interval`-th step is full, and the last one. On the others a
    share r = `ratio` · (1 + s − 2s·b/(L−1)) · (1 + p − 2p·i/N) of the tokens is fresh, b of L the
    block, i of N the step, s = `layer_slope`, p = `step_slope`, times `cross` in cross-attention;
    fresh outputs stay in the cache. A token's score is its influence, plus `staleness` · age /
    `interval`, plus `spread` · score for the best token of each `cell` × `cell` patch of the grid.

    Influence: where the block has cross-attention, 1 + the entropy of the token's attention to the
    words that its mask lets through, as in the paper; elsewhere the smallness of its value vector
    (the authors' DuCa), because fused kernels give no attention maps. Scores are unit vectors over
    the tokens, taken at full steps. In one call for both guidance branches their scores are
    averaged. Layers that have other tokens than the scored ones (text MLPs) are scored by age
    alone; fused layers are reused.

    Rows of a batch choose their own tokens. Holds one tensor a sublayer and branch.
    """

    slot: ClassVar[str] = "stack"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"interval": 2},
        {"interval": 3},
        {"interval": 4, "ratio": 0.3},
    )

    interval: int = 3
    ratio: float = 0.15
    warmup: int = 3
    layer_slope: float = 0.0
    step_slope: float = 0.0
    cross: float = 0.4
    staleness: float = 0.25
    spread: float = 0.4
    cell: int = 0

    def __post_init__(self) -> None:
        check(is_count(self.interval, 1), self, "interval", "a whole number ≥ 1")
        check(is_number(self.ratio) and 0 <= self.ratio <= 1, self, "ratio", "between 0 and 1")
        check(is_count(self.warmup, 1), self, "warmup", "a whole number ≥ 1")
        for field in ("layer_slope", "step_slope"):
            slope = getattr(self, field)
            check(is_number(slope) and -1 <= slope <= 1, self, field, "between −1 and 1")
        for field in ("cross", "staleness", "spread"):
            value = getattr(self, field)
            check(is_number(value) and value >= 0, self, field, "a number ≥ 0")
        check(is_count(self.cell, 0), self, "cell", "a whole number ≥ 0; 0 leaves it out")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to every attention and MLP layer."""
        depth = max(len(denoiser.chain.blocks) - 1, 1)
        for layer in sublayers(denoiser.chain, "ToCa"):
            attention = type(layer.modules[0]).__name__
            if layer.kind == "self" and not hasattr(layer.modules[0], "to_v"):
                raise AccelError(
                    f"ToCa scores tokens by attention's values, and {attention} of "
                    f"{type(denoiser.module).__name__} has no to_v"
                )

        def doubled() -> bool:
            assert denoiser.forward is not None  # asked by policies only
            return is_doubled(denoiser, denoiser.forward.arguments)

        def policies(_: Branch, layers: Sequence[Sublayer]) -> list[Policy]:
            halves = cache(doubled)
            crossed = {layer.parent for layer in layers if layer.kind == "cross"}
            scores = {layer.parent: _Influence(halves) for layer in layers}
            return [
                _Tokens(
                    self,
                    layer,
                    scores[layer.parent],
                    layer.kind == ("cross" if layer.parent in crossed else "self"),
                    layer.block / depth,
                )
                for layer in layers
            ]

        return cache_sublayers(denoiser, policies, HoldResidual(), "ToCa")


class _Influence:
    """The scores of one block's tokens, (batch, tokens), from its last full step."""

    def __init__(self, halves: Callable[[], bool]) -> None:
        """`halves`: whether the batch holds both guidance branches."""
        self.halves = halves
        self.score: Tensor | None = None

    def of_attention(
        self, attention: Any, hidden: Tensor, text: Tensor | None, mask: Tensor | None
    ) -> None:
        """Take the scores from the input of an attention layer; `text` of cross-attention."""
        if text is None or text.shape[1] == 0:
            score = -attention.to_v(hidden).float().norm(dim=-1)
        else:
            score = 1 + _entropy(attention, hidden, text, mask)
        if len(score) % 2 == 0 and self.halves():
            uncond, cond = score.chunk(2)
            score = ((uncond + cond) / 2).repeat(2, 1)
        self.score = torch.nn.functional.normalize(score, dim=1)


class _Tokens:
    """One layer: full steps, and on the others its fresh tokens."""

    def __init__(
        self, settings: ToCa, layer: Sublayer, influence: _Influence, scores: bool, depth: float
    ) -> None:
        self.settings, self.layer, self.influence = settings, layer, influence
        self.scores, self.depth, self.since = scores, depth, 0
        self.age: Tensor | None = None
        self.output: Tensor | None = None

    def skip(self, context: StepContext, signals: Signals) -> bool:
        if context.step < self.settings.warmup or context.last:
            return False
        return context.skipped < self.settings.interval - 1

    def computed(self, context: StepContext, signals: Signals, site: Computed) -> None:
        hidden, text, mask = site.inputs
        self.output, self.age = site.outputs[0], None
        if not self.scores or hidden is None or self.settings.interval == 1:
            return
        attention = self.layer.modules[0]
        words = _words(attention, text) if self.layer.kind == "cross" else None
        self.influence.of_attention(attention, hidden, words, mask)

    def refine(
        self,
        context: StepContext,
        signals: Signals,
        forecast: Streams,
        compute: Callable[..., Streams],
    ) -> Streams:
        output = self.output
        if self.layer.kind not in ("mlp", "cross") or output is None:
            return forecast
        count = min(int(self._ratio(context) * output.shape[1]), output.shape[1])
        if self.age is None:
            self.age = torch.zeros(output.shape[:2], device=output.device)
        self.age += 1
        if count > 0:
            chosen = self._score(signals).topk(count, dim=1).indices
            (fresh,) = compute(chosen)
            assert fresh is not None  # a layer returns a tensor
            wide = chosen.unsqueeze(-1).expand_as(fresh)
            self.output = output = output.scatter(1, wide, fresh)
            self.age = self.age.scatter(1, chosen, 0.0)
        return (output, *forecast[1:])

    def _ratio(self, context: StepContext) -> float:
        settings = self.settings
        by_layer = 1 + settings.layer_slope * (1 - 2 * self.depth)
        by_step = 1 + settings.step_slope * (1 - 2 * context.step / context.total)
        kind = settings.cross if self.layer.kind == "cross" else 1.0
        return min(max(settings.ratio * by_layer * by_step * kind, 0.0), 1.0)

    def _score(self, signals: Signals) -> Tensor:
        assert self.age is not None  # set before
        score = self.settings.staleness * self.age / self.settings.interval
        influence = self.influence.score
        if influence is None or influence.shape != score.shape:
            return score
        score = score + influence
        if self.settings.cell:
            score = _spread(score, signals.grid, self.settings.cell, self.settings.spread)
        return score


def _words(attention: Any, text: Any) -> Tensor | None:
    """The prompt without a picture's tokens: an IP adapter's beside it, Wan's before it."""
    words: Tensor | None = text[0] if isinstance(text, tuple) else text
    if words is not None and getattr(attention, "add_k_proj", None) is not None:
        words = words[:, -WAN_WORDS:]
    return words


def _entropy(attention: Any, hidden: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """Entropy of each token's attention to the text, its heads averaged: (batch, tokens)."""
    query, key = attention.to_q(hidden), attention.to_k(text)
    norms = getattr(attention, "norm_q", None), getattr(attention, "norm_k", None)
    width = query.shape[-1] // attention.heads

    def split(tensor: Tensor, norm: Any) -> Tensor:
        if norm is not None and norm.weight.shape[-1] == tensor.shape[-1]:
            tensor, norm = norm(tensor), None
        tensor = tensor.unflatten(-1, (-1, width)).transpose(1, 2)
        return (tensor if norm is None else norm(tensor)).float()

    query, key = split(query, norms[0]), split(key, norms[1])
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    found = []
    for start in range(0, query.shape[2], ROWS):
        rows = query[:, :, start : start + ROWS]
        logits = _masked(rows @ key.transpose(-1, -2) / width**0.5, mask, start)
        weights = logits.softmax(-1).mean(1)
        found.append(-(weights * (weights + 1e-7).log()).sum(-1))
    return torch.cat(found, 1)


def _masked(logits: Tensor, mask: Tensor | None, start: int) -> Tensor:
    """Logits (batch, heads, tokens, words) with a layer's mask: a bias, or nonzero for words.

    The tokens are those from `start` on.
    """
    if mask is None or mask.shape[-1] != logits.shape[-1]:
        return logits
    mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    if mask.shape[2] > 1:
        mask = mask[:, :, start : start + logits.shape[2]]
    if mask.is_floating_point():
        return logits + mask
    return logits.masked_fill(mask == 0, torch.finfo(logits.dtype).min)


def _spread(score: Tensor, grid: tuple[int, int, int] | None, cell: int, bonus: float) -> Tensor:
    """Add `bonus` · score to the best token of every cell × cell patch of each frame."""
    if grid is None or score.shape[1] != math.prod(grid):
        return score
    frames, rows, columns = grid
    if rows % cell or columns % cell:
        raise AccelError(
            f"ToCa(cell={cell}): the grid of {rows} × {columns} tokens has no whole cells of that "
            "size; 0 leaves the spread out"
        )
    shape = (len(score), frames, rows // cell, cell, columns // cell, cell)
    cells = score.reshape(shape).transpose(3, 4).flatten(4)
    best = cells.argmax(-1, keepdim=True)
    raised = cells.scatter_add(-1, best, bonus * cells.gather(-1, best))
    whole: Tensor = raised.unflatten(-1, (cell, cell)).transpose(3, 4).reshape(score.shape)
    return whole
