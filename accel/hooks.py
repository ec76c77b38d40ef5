"""Overriding methods of single objects by giving the object a subclass of its own class.

The override lies outside `forward`, so compiled regions, accelerate's offload hooks, PEFT and
diffusers' own hooks keep working, and giving the class back restores the object exactly.
This is the only file of the package that touches private parts of torch or diffusers.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accel.method import AccelError

_STATE = "_accel_overrides"
PATCH = "_accel_patch"
PRIVATE = (_STATE, PATCH)
"""Everything this package puts into an object's `__dict__`; copies and pickles leave it out."""
_subclasses: dict[tuple[type, tuple[str, ...]], type] = {}

Override = Callable[..., Any]
"""Called as `override(original, *args, **kwargs)`; `original` is the untouched bound method."""


def override(instance: Any, overrides: Mapping[str, Override]) -> Callable[[], None]:
    """Override methods of `instance` alone; returns the undo.

    Copies and pickles of the instance are plain objects of the original class.
    """
    if _STATE in instance.__dict__:
        raise AccelError(f"this {type(instance).__name__} is patched already; accel.unpatch first")
    base = plain_class(instance)
    names = tuple(sorted(name for name in overrides if hasattr(base, name)))
    subclass = _subclass(base, names)
    instance.__dict__[_STATE] = dict(overrides)
    instance.__class__ = subclass

    def undo() -> None:
        instance.__dict__.pop(_STATE, None)
        if type(instance) is subclass:
            instance.__class__ = base

    return undo


def plain_class(instance: Any) -> type:
    """The class of an instance without our overrides.

    `type(patched.scheduler).from_config(...)` makes an instance of our subclass, and so does
    diffusers of an attention processor.
    """
    own = type(instance)
    return next((plain for (plain, _), ours in _subclasses.items() if ours is own), own)


def tidy(instance: Any) -> None:
    """Give an instance that was made from our subclass, and is not overridden, its plain class."""
    plain = plain_class(instance)
    if plain is not type(instance) and _STATE not in instance.__dict__:
        instance.__class__ = plain


def _subclass(base: type, names: tuple[str, ...]) -> type:
    """One subclass per class and set of names, so that compiled code is shared between blocks."""
    key = (base, names)
    if key not in _subclasses:
        namespace: dict[str, Any] = {name: _delegate(name, getattr(base, name)) for name in names}
        namespace |= {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce_as(base),
        }
        _subclasses[key] = type(base.__name__, (base,), namespace)
        _share_block_metadata(base, _subclasses[key])
    return _subclasses[key]


def _delegate(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        overrides = self.__dict__.get(_STATE)
        bound = original.__get__(self)
        if overrides is None:
            return bound(*args, **kwargs)
        return overrides[name](bound, *args, **kwargs)

    return method


def _new(base: type, *args: Any) -> Any:
    return base.__new__(base, *args)


def _reduce_as(base: type) -> Callable[[Any, Any], Any]:
    """Reduce to the original class without our state, for `copy` and `pickle`."""

    def reduce(self: Any, protocol: Any) -> Any:
        reduced: Any = super(type(self), self).__reduce_ex__(protocol)
        constructor, arguments, *rest = reduced
        if constructor is copyreg.__newobj__:  # type: ignore[attr-defined]
            constructor = _new
        arguments = tuple(base if item is type(self) else item for item in arguments)
        if rest and isinstance(rest[0], dict):
            rest[0] = {key: value for key, value in rest[0].items() if key not in PRIVATE}
        return (constructor, arguments, *rest)

    return reduce


def _share_block_metadata(base: type, subclass: type) -> None:
    """Let diffusers' guiders and hooks, which look classes up exactly, know the subclass too."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        TransformerBlockRegistry._register()
        known = TransformerBlockRegistry._registry
    except (ImportError, AttributeError):
        return
    if base in known:
        known[subclass] = known[base]


def foreign_cache(module: Any) -> str | None:
    """Name of a cache that somebody else enabled on a denoiser, or None."""
    if getattr(module, "is_cache_enabled", False):
        return type(module._cache_config).__name__
    if getattr(module, "_is_cached", False):
        return "cache-dit"
    return None


@contextlib.contextmanager
def native_dispatch(processor: Any) -> Iterator[None]:
    """This processor alone dispatches to diffusers' native attention; nothing global is touched."""
    if not hasattr(processor, "_attention_backend"):
        yield
        return
    own = processor.__dict__
    before = {name: own[name] for name in ("_attention_backend",) if name in own}
    processor._attention_backend = "native"
    try:
        yield
    finally:
        del processor._attention_backend  # the class has the default
        own.update(before)


def vendor_attention(name: str) -> Callable[..., Any] | str:
    """diffusers' attention backend `name` as f(q, k, v, **options), or why it cannot run here.

    Tensors are (batch, heads, tokens, head_dim).
    """
    try:
        from diffusers.models.attention_dispatch import (
            AttentionBackendName,
            _check_attention_backend_requirements,
            dispatch_attention_fn,
        )

        backend = AttentionBackendName(name)
        _check_attention_backend_requirements(backend)
    except (ImportError, ValueError, RuntimeError) as error:
        return str(error)

    def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
        tokens_first = (each.transpose(1, 2) for each in (query, key, value))
        return dispatch_attention_fn(*tokens_first, backend=backend, **options).transpose(1, 2)

    return attend


def parallel_group(module: Any) -> Any:
    """The process group over which diffusers splits one sequence of this denoiser, or None."""
    context = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    return None if context is None else context._flattened_mesh.get_group()


def split_before(
    block: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Make the split of context parallelism before a block's call instead of inside its `forward`.

    Some models split their sequence in the first block. Whoever skips that block must see, and
    hand on, the rank's own part. Returns the call and its arguments after the split.
    """
    hooks = getattr(block.__dict__.get("_diffusers_hook"), "hooks", {})
    splits = [hook for name, hook in hooks.items() if name.startswith("cp_input")]
    if not splits:
        return original, args, kwargs
    (hook,) = splits

    def unsplit(*args: Any, **kwargs: Any) -> Any:
        hook.fn_ref.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            hook.fn_ref.pre_forward = hook.pre_forward

    args, kwargs = hook.pre_forward(block, *args, **kwargs)
    return unsplit, args, kwargs


def waited(tensor: Any) -> Any:
    """The tensor itself, when a collective that is still in flight wraps it."""
    wait = getattr(tensor, "trigger_wait", None)
    return tensor if wait is None else wait()


def is_compiled_whole(module: Any) -> bool:
    """Whether the whole denoiser (not its blocks) was compiled."""
    return hasattr(module, "_orig_mod") or (
        getattr(module, "_compiled_call_impl", None) is not None
    )


def is_group_offloaded(module: Any) -> bool:
    """Whether diffusers brings parts of the module to the device only while they are called."""
    return any(
        "group_offloading" in getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        for part in module.modules()
    )


def onload(module: Any) -> None:
    """Bring what group offload keeps away of a module to its device, as the module's forward does.

    For who calls a part of the module alone.
    """
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    if "group_offloading" in hooks:
        group = hooks["group_offloading"].group
        group.onload_()
        if group.stream is not None:
            group.stream.synchronize()


def adapters_of(module: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a module's loaded LoRAs, and of those among them that are active."""
    layers = _adapter_layers(module)
    loaded = dict.fromkeys(name for layer in layers for name in layer.lora_A)
    active = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    return tuple(loaded), tuple(name for name in active if name in loaded)


@contextlib.contextmanager
def using_adapter(module: Any, name: str) -> Iterator[None]:
    """One LoRA alone is active: a name is exchanged in each layer, no weight is touched."""
    layers = _adapter_layers(module)
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def _adapter_layers(module: Any) -> list[Any]:
    return [part for part in module.modules() if hasattr(part, "lora_A")]


def call_arguments(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, with its defaults; the call itself says what is wrong."""
    try:
        bound = inspect.signature(call).bind(*args, **kwargs)
    except TypeError:
        return dict(kwargs)
    bound.apply_defaults()
    return bound.arguments


def call_length(pipe: Any, schedule: int) -> int:
    """How many steps of the scheduler's `schedule` this call makes; fewer for image-to-image."""
    made = getattr(pipe, "_num_timesteps", None)
    return made if isinstance(made, int) and 0 < made <= schedule else schedule
