"""Layers inside blocks: which are found, and that reuse equals a replay with plain hooks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tiny_pipelines import TINY, built, run

import accel
from accel import registry
from accel.chain import Chain
from accel.geometry import token_grid
from accel.sublayer import sublayers

EXPECTED = {
    "flux": {"self", "mlp", "fused"},
    "sd3": {"self", "mlp"},
    "pixart": {"self", "cross", "mlp"},
    "wan21": {"self", "cross", "mlp"},
    "latte": {"self", "temporal", "cross", "mlp"},
    "mochi": {"self", "mlp"},
    "qwen_image": {"self", "mlp"},
    "dit": {"self", "mlp"},
    "sd15": {"self", "cross", "mlp"},
}
COMPONENTS = ("transformer", "transformer_2", "unet")
ATTENTION = ("attn", "attn1", "attn2")
MLPS = ("ff", "ff_context", "ffn", "img_mlp", "txt_mlp")


def denoiser(name: str) -> Any:
    pipe = built(name)[0].pipe
    return getattr(pipe, "transformer", None) or pipe.unet


@pytest.mark.parametrize("name", EXPECTED)
def test_the_layers_of_each_kind_are_found(name) -> None:
    """In every block of a transformer, each module once."""
    module = denoiser(name)
    chain = Chain(module, registry.family(module))
    found = sublayers(chain, name)
    assert {layer.kind for layer in found} == EXPECTED[name]
    modules = [id(part) for layer in found for part in layer.modules]
    assert len(set(modules)) == len(modules)
    if name != "sd15":
        assert {layer.block for layer in found} == set(range(len(chain.blocks)))


def hold(pipe: Any, interval: int) -> list[Any]:
    """Plain hooks that repeat each layer's output of the last full step."""
    hooks: list[Any] = []
    step = {"now": 0}
    modules = [m for n in COMPONENTS if (m := getattr(pipe, n, None)) is not None]
    original = type(pipe.scheduler).step

    def count(*args: Any, **kwargs: Any) -> Any:
        result = original(pipe.scheduler, *args, **kwargs)
        step["now"] += 1
        return result

    count.__signature__ = __import__("inspect").signature(pipe.scheduler.step)
    pipe.scheduler.step = count

    def watch(layer: Any) -> None:
        kept: dict[int, Any] = {}
        calls = Counter()

        def after(module: Any, args: Any, output: Any) -> Any:
            ordinal = calls[step["now"]]
            calls[step["now"]] += 1
            if step["now"] % interval == 0:
                kept[ordinal] = output
                return None
            return kept[ordinal]

        hooks.append(layer.register_forward_hook(after))

    for module in modules:
        for name, child in module.named_modules():
            leaf = name.rsplit(".", 1)[-1]
            owner = module.get_submodule(name.rsplit(".", 1)[0]) if "." in name else module
            if hasattr(owner, "proj_mlp") and hasattr(owner, "proj_out") and "." in name:
                if leaf == "proj_out":
                    watch(child)
            elif leaf in (*ATTENTION, *MLPS) and "refiner" not in name:
                watch(child)
    return hooks


@pytest.mark.parametrize("name", [name for name in TINY if name != "wan22"])
def test_fora_equals_plain_hooks(name) -> None:
    tiny, _ = built(name)
    with accel.patched(tiny.pipe, accel.FORA(interval=3)) as handle:
        result = run(tiny)
        assert 0.3 < handle.report().share_computed < 0.5
    hooks = hold(tiny.pipe, 3)
    try:
        expected = run(tiny)
    finally:
        for hook in hooks:
            hook.remove()
        del tiny.pipe.scheduler.step
    assert float((result - expected).abs().max() / expected.abs().max()) < 2e-5


def test_chunked_feed_forward_is_refused() -> None:
    tiny = TINY["pixart"]()
    for block in tiny.pipe.transformer.transformer_blocks:
        block.set_chunk_feed_forward(2, dim=1)
    with pytest.raises(accel.AccelError, match="chunking"):
        accel.patch(tiny.pipe, accel.FORA())
    assert "_accel_patch" not in tiny.pipe.__dict__


def test_token_grids_fit_the_hidden_states() -> None:
    """The grid has as many tokens as block 0 receives."""
    from accel.hooks import PATCH

    for name in TINY:
        tiny, _ = built(name)
        seen: list[tuple[int, int]] = []
        with accel.patched(tiny.pipe, accel.PlainCycle(interval=2)):
            inner = tiny.pipe.__dict__[PATCH]._denoisers[0]
            if not inner.chain.blocks:
                continue
            first = inner.chain.blocks[0]

            def look(_: Any, args: Any, kwargs: Any, inner: Any = inner, seen: Any = seen) -> None:
                grid = token_grid(inner.module, inner.family, inner.forward.arguments)
                hidden = args[0] if args else kwargs["hidden_states"]
                tokens = hidden.shape[1] if hidden.dim() == 3 else hidden.shape[2] * hidden.shape[3]
                seen.append((grid[0] * grid[1] * grid[2], tokens))

            hook = first.register_forward_pre_hook(look, with_kwargs=True)
            run(tiny)
            hook.remove()
        assert seen
        whole, tokens = seen[0]
        frames = 1 if name != "latte" else whole // tokens
        assert whole == tokens * frames, name
