"""A weight stored in fewer bits that stands in a linear layer's place of the weight.

A tensor subclass as torchao's: the layer object, LoRA around it and hooks on it stay as they are,
and only `functional.linear` sees what the weight is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from accel.kernels.linear_formats import FORMATS
from accel.method import AccelError

if TYPE_CHECKING:
    from torch import Tensor

Linear = Callable[["Tensor", "Tensor", "Tensor", "Tensor | None"], "Tensor"]
_COPIES = (
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
)


class QuantisedWeight(torch.Tensor):
    """(out_features, in_features) of the original's dtype and device, to be read by linear layers.

    Everything but moving, copying and `functional.linear` raises `AccelError`: a LoRA cannot be
    fused into it.
    """

    codes: Tensor
    scale: Tensor
    format: str
    compute: Linear

    @staticmethod
    def of(weight: Tensor, name: str, compute: Linear | None = None) -> QuantisedWeight:
        """`weight` in format `name`; `compute(x, values, scale, bias)` instead of the reference."""
        values, scale = FORMATS[name].quantise(weight.detach())
        compute = compute or FORMATS[name].linear
        return _built(values, scale, name, compute, weight.shape, weight.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """A linear layer with this weight; the rest goes on to `__torch_dispatch__`."""
        if func is functional.linear:
            return _linear(*args, **(kwargs or {}))
        if func is torch.Tensor.storage:  # what safetensors asks for
            raise _refusal("The memory")
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]  # by group offload
            raise _refusal("Setting the data")
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Copies and moves; nothing may read or change the values as if they were the weight."""
        kwargs = dict(kwargs or {})
        if func in _COPIES:
            return _mapped(args[0], lambda part: func(part), args[0].dtype)
        if func is torch.ops.aten._to_copy.default:
            dtype = kwargs.pop("dtype", None) or args[0].dtype
            return _mapped(args[0], lambda part: func(part, **kwargs), dtype)
        raise _refusal(str(func))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """For torch.compile and module moves."""
        return ["codes", "scale"], (self.format, self.compute, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], context: Any, shape: Any, stride: Any
    ) -> QuantisedWeight:
        """The inverse of `__tensor_flatten__`."""
        name, compute, dtype = context
        return _built(parts["codes"], parts["scale"], name, compute, shape, dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantisedWeight({self.format}, {tuple(self.shape)})"


def _refusal(wanted: str) -> AccelError:
    return AccelError(
        f"{wanted} of a weight that accel.Linear quantised; unpatch first, for instance to fuse "
        "a LoRA, to save the weights or to offload them by groups"
    )


def _built(
    codes: Tensor, scale: Tensor, name: str, compute: Linear, shape: Any, dtype: torch.dtype
) -> QuantisedWeight:
    made: QuantisedWeight = torch.Tensor._make_wrapper_subclass(
        QuantisedWeight, shape, dtype=dtype, device=codes.device
    )
    made.codes, made.scale, made.format, made.compute = codes, scale, name, compute
    return made


def _mapped(
    weight: QuantisedWeight, change: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> QuantisedWeight:
    values, scale = change(weight.codes), change(weight.scale)
    return _built(values, scale, weight.format, weight.compute, weight.shape, dtype)


def _linear(input: Tensor, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    return weight.compute(input, weight.codes, weight.scale, bias)
