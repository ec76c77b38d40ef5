"""Principal attention: queries and keys are compared along their principal components alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from accel.attention_calls import AttentionCall, intercept, self_attention
from accel.denoiser import Denoiser
from accel.kernels.attention_inputs import repeat_heads, softmax_scale
from accel.method import Handle, check, is_number

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[str, str, int]
MULTIPLE = 8
"""Components are counted in these: what matrix units multiply at once."""


@dataclass(frozen=True)
class PrincipalAttention:
    """Multiply queries and keys in the few directions that hold a share `variance` of them.

    The pruning of UniCP (Sun et al., 2025), its "PCA-based slicing"; **reconstructed**, as the
    paper's equations were not available. In the first `warmup` share of the steps attention is the
    model's own, and the second moments of its queries and keys (after the rotary embedding) are
    summed for every layer, branch, sample and head. Their eigenvectors of the largest eigenvalues
    that sum to `variance` of the trace are the directions U; from then on the scores are
    (QU)(KU)ᵀ at the old scale. `UniCP(variance=…)` has this, its windows and their blending.

    For self-attention; masks are kept. Static after the warmup: one host read a layer, sample rows
    independent. Saves multiplications of QKᵀ only, in proportion to the directions left out, and
    needs a kernel whose queries are narrower than its values; torch's fast ones are not.
    """

    slot: ClassVar[str] = "attention"
    trials: ClassVar[tuple[dict[str, Any], ...]] = (
        {"variance": 0.99},
        {"variance": 0.95},
        {"variance": 0.9},
    )

    variance: float = 0.95
    warmup: float = 0.1

    def __post_init__(self) -> None:
        for name in ("variance", "warmup"):
            value = getattr(self, name)
            check(is_number(value) and 0 < value <= 1, self, name, "a number in (0, 1]")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to the self-attention of all blocks."""
        return Pruning(self, denoiser).attach("PrincipalAttention")


def second_moments(query: Tensor, key: Tensor) -> Tensor:
    """QᵀQ + KᵀK of every head in fp32, (batch, heads, head_dim, head_dim)."""
    q, k = query.float(), repeat_heads(key, query.shape[1]).float()
    return q.mT @ q + k.mT @ k


def directions(moments: Tensor, variance: float) -> Tensor | None:
    """The leading eigenvectors, (batch, heads, head_dim, r); None where every sample needs all.

    r is what the neediest head of all needs, as a multiple of 8; in the other heads the directions
    beyond their own are zero. A sample with a head that needs all of them keeps all in every head,
    as it would alone, so that no sample depends on another.
    """
    values, vectors = torch.linalg.eigh(moments)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    before = values.cumsum(-1) - values
    wanted = (before < variance * values.sum(-1, keepdim=True)) | (variance == 1)
    size: int = wanted.shape[-1]
    widths = [-(-most // MULTIPLE) * MULTIPLE for most in wanted.sum(-1).amax(-1).tolist()]
    if min(widths) >= size:
        return None
    whole = torch.tensor([width >= size for width in widths], device=wanted.device)
    wanted |= whole[:, None, None]
    width = min(max(widths), size)
    found: Tensor = vectors[..., :width] * wanted[..., None, :width]
    return found


class Pruning:
    """The method on one denoiser: moments while it warms up, then directions."""

    def __init__(self, settings: PrincipalAttention, denoiser: Denoiser) -> None:
        self.settings, self.denoiser = settings, denoiser
        self.moments: dict[Key, Tensor] = {}
        self.found: dict[Key, Tensor | None] = {}
        self.barred: set[int] = set()
        self.done: set[int] = set()

    def attach(self, method: str) -> Handle:
        """Attach to the self-attention of all blocks; raises for `method` when there is none."""
        layers = self_attention(self.denoiser, method)
        return intercept(self.denoiser, layers, self.attend, self.forget)

    def forget(self) -> None:
        """A run begins or ends."""
        self.moments, self.found, self.barred, self.done = {}, {}, set(), set()

    def allow(self, attention: Any, allowed: bool) -> None:
        """Whether a layer may be pruned from now on; at first all may."""
        (self.barred.discard if allowed else self.barred.add)(id(attention))

    def pruned(self, attention: Any) -> bool:
        """Whether the last call of a layer was pruned."""
        return id(attention) in self.done

    def attend(self, call: AttentionCall) -> Tensor:
        """One self-attention of the model."""
        forward, module = self.denoiser.forward, id(call.layer.module)
        self.done.discard(module)
        if forward is None or call.key.shape[2] != call.query.shape[2]:
            return call.plain()
        branch = forward.state.branch
        key: Key = (call.layer.name, branch.name, branch.ordinal)
        if forward.step < max(self.settings.warmup * forward.total, 1):
            new = second_moments(call.query, call.key)
            self.moments[key] = self.moments[key] + new if key in self.moments else new
            return call.plain()
        if key in self.moments:
            self.found[key] = directions(self.moments.pop(key), self.settings.variance)
        basis = self.found.get(key)
        if basis is None or module in self.barred:
            return call.plain()
        self.done.add(module)
        return _along(call, basis.to(call.query.dtype))


def _along(call: AttentionCall, basis: Tensor) -> Tensor:
    """Attention with queries and keys in the directions of `basis`."""
    heads, scale = call.query.shape[1], softmax_scale(call.query, call.scale)
    key, value = (repeat_heads(each, heads) for each in (call.key, call.value))
    return scaled_dot_product_attention(
        call.query @ basis,
        key @ basis,
        value,
        attn_mask=call.attn_mask,
        is_causal=call.is_causal,
        scale=scale,
    )
