"""The attention kernels by name, and for each one whether it can run here and if not why."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accel.attention_calls import AttentionCall
from accel.hooks import vendor_attention
from accel.kernels.attention_inputs import why_not

if TYPE_CHECKING:
    from torch import Tensor


class AttentionKernel(Protocol):
    """One way to compute an attention; `exact` up to the rounding of its dtype."""

    @property
    def exact(self) -> bool:
        """Whether it computes softmax attention itself and not an approximation."""
        ...

    def why_not(self, query: Tensor, reference: bool = False) -> str | None:
        """Why it cannot run on tensors like `query`, or None; `reference` allows slow twins."""
        ...

    def run(self, call: AttentionCall) -> Tensor:
        """Compute; raises when these very arguments are not taken after all."""
        ...


@dataclass(frozen=True)
class TorchBackend:
    """One backend of torch's own attention; None is torch's choice."""

    backend: SDPBackend | None = None
    exact: bool = True

    def why_not(self, query: Tensor, reference: bool = False) -> str | None:
        """Tried on one token: torch says itself what is missing."""
        if self.backend is None:
            return None
        small = query[:1, :1, :1].contiguous()
        with warnings.catch_warnings(record=True) as said:  # where torch puts its reasons
            warnings.simplefilter("always")
            try:
                with sdpa_kernel([self.backend]):
                    scaled_dot_product_attention(small, small, small)
            except RuntimeError as error:
                if query.device.type != "cuda":
                    return f"torch has no such attention on {query.device.type}"
                reasons = [str(each.message) for each in said] or [str(error)]
                return "torch: " + "; ".join(each.split(" (Triggered")[0] for each in reasons)
        return None

    def run(self, call: AttentionCall) -> Tensor:
        """The model's own call, pinned to this backend."""
        if self.backend is None:
            return call.plain()
        with sdpa_kernel([self.backend]):
            return call.plain()


@dataclass(frozen=True)
class VendorKernel:
    """A vendor's package behind diffusers' dispatcher, by its backend name there."""

    backend: str
    exact: bool = True

    def why_not(self, query: Tensor, reference: bool = False) -> str | None:
        """Whether the package is there, and the tensors are on a GPU in half precision."""
        found = vendor_attention(self.backend)
        if isinstance(found, str):
            return found
        if query.device.type != "cuda" or query.dtype.itemsize != 2:
            return f"needs half precision on CUDA, not {query.dtype} on {query.device.type}"
        return None

    def run(self, call: AttentionCall) -> Tensor:
        """Masks are left to torch: not every vendor's kernel heeds them."""
        attend = vendor_attention(self.backend)
        if isinstance(attend, str) or call.attn_mask is not None:
            raise ValueError("this kernel takes no mask")
        options = {"is_causal": call.is_causal, "scale": call.scale}
        output: Tensor = attend(call.query, call.key, call.value, **options)
        return output


@dataclass(frozen=True)
class OwnKernel:
    """One of this package's Triton kernels, "module:function", with a torch reference inside."""

    place: str
    exact: bool = False
    capability: tuple[int, int] = (8, 0)

    def why_not(self, query: Tensor, reference: bool = False) -> str | None:
        """What Triton and the device miss; with `reference` nothing is missing."""
        if reference:
            return None
        if query.dtype.itemsize != 2:
            return f"low-bit kernels pay for float16 and bfloat16 models, not {query.dtype}"
        return why_not(query, self.capability)

    def run(self, call: AttentionCall) -> Tensor:
        """The kernel on CUDA, the reference elsewhere."""
        module, name = self.place.split(":")
        attend: Callable[..., Any] = getattr(importlib.import_module(module), name)
        output: Tensor = attend(
            call.query,
            call.key,
            call.value,
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
            scale=call.scale,
        )
        return output


KERNELS: dict[str, AttentionKernel] = {
    "sdpa": TorchBackend(),
    "cudnn": TorchBackend(SDPBackend.CUDNN_ATTENTION),
    "flash": TorchBackend(SDPBackend.FLASH_ATTENTION),
    "efficient": TorchBackend(SDPBackend.EFFICIENT_ATTENTION),
    "math": TorchBackend(SDPBackend.MATH),
    "flash_attn": VendorKernel("flash"),
    "flash_attn_3": VendorKernel("_flash_3"),
    "triton": OwnKernel("accel.kernels.flash_attention:flash_attention", exact=True),
    "sage_int8": OwnKernel("accel.kernels.sage_attention:sage_int8"),
    "sage_int8_fp8": OwnKernel("accel.kernels.sage_attention:sage_int8_fp8", capability=(8, 9)),
}
LOSSLESS = ("sdpa", "cudnn", "flash", "efficient", "flash_attn", "flash_attn_3")
"""What "auto" chooses from, torch's own choice first."""
LOW_BIT = ("sage_int8_fp8", "sage_int8")
"""What "adaptive" chooses from, the fastest first."""


def survey(query: Tensor) -> dict[str, str]:
    """For tensors like `query`: each kernel's name and "runs", or why it does not."""
    return {name: kernel.why_not(query) or "runs" for name, kernel in KERNELS.items()}
