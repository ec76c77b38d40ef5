"""The text cache: exact, beside every method, silent where it cannot help."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import TINY, built, run

import accel

CROSS = ["sd15", "sdxl", "pixart", "wan21", "wan22", "ltx", "latte"]
CYCLE = accel.PlainCycle(interval=2)


def keys_computed(pipe) -> tuple[list[int], object]:
    """A list that grows at every call of a cross-attention's keys, and its hook."""
    module = getattr(pipe, "transformer", None) or pipe.unet
    attention = next(m for n, m in module.named_modules() if n.endswith("attn2"))
    calls: list[int] = []
    return calls, attention.to_k.register_forward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("family", CROSS)
@pytest.mark.parametrize("by", ["name", "default"])
def test_it_is_exact_and_computes_once(family, by) -> None:
    tiny, baseline = built(family)
    calls, hook = keys_computed(tiny.pipe)
    run(tiny)
    before = len(calls)
    calls.clear()
    method = accel.TextCache() if by == "name" else accel.PlainCycle(interval=1)
    with accel.patched(tiny.pipe, method):
        assert torch.equal(run(tiny), baseline)
        assert torch.equal(run(tiny, prompt="zebra"), run(TINY[family](), prompt="zebra"))
    hook.remove()
    if family != "latte":  # which repeats the text for each frame anew
        assert len(calls) < before
    assert torch.equal(run(tiny), baseline)


def test_a_budget_of_memory_leaves_it_out() -> None:
    tiny, baseline = built("pixart")
    calls, hook = keys_computed(tiny.pipe)
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=1), memory="1GB"):
        assert torch.equal(run(tiny), baseline)
    hook.remove()
    assert len(calls) == 8


def changing(tiny, change) -> torch.Tensor:
    """The result of a run in whose middle something is changed."""

    def end(pipe, step, timestep, tensors):
        if step == 3:
            change(pipe.transformer)
        return tensors

    return run(tiny, callback_on_step_end=end)


def test_adapters_may_change_during_a_run() -> None:
    tiny = TINY["wan21"]()
    names = ["to_k", "to_v"]
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=names, init_lora_weights=False)
    tiny.pipe.transformer.add_adapter(lora)

    def result():
        tiny.pipe.transformer.set_adapters(["default"], [1.0])
        return changing(tiny, lambda module: module.set_adapters(["default"], [3.0]))

    wanted = result()
    with accel.patched(tiny.pipe, accel.TextCache()):
        assert torch.equal(result(), wanted)
    tiny.pipe.transformer.set_adapters(["default"], [1.0])
    assert not torch.equal(run(tiny), wanted)


def test_weights_that_change_are_seen() -> None:
    tiny = TINY["wan21"]()

    def scale(module, factor) -> None:
        with torch.no_grad():
            module.blocks[0].attn2.to_v.weight.mul_(factor)

    wanted = changing(tiny, lambda module: scale(module, 0.5))
    scale(tiny.pipe.transformer, 2)
    with accel.patched(tiny.pipe, accel.TextCache()):
        assert torch.equal(changing(tiny, lambda module: scale(module, 0.5)), wanted)
    assert not torch.equal(run(tiny), wanted)


@pytest.mark.slow
def test_compiled_blocks_keep_whole_graphs() -> None:
    torch._dynamo.reset()
    tiny = TINY["wan21"]()
    wanted = run(tiny)
    accel.patch(tiny.pipe, accel.PlainCycle(interval=1))
    tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.allclose(run(tiny), wanted, atol=1e-5)
    torch._dynamo.reset()


def test_what_holds_the_layers_already_is_left_alone() -> None:
    tiny, baseline = built("pixart")
    with accel.patched(tiny.pipe, accel.TextCache(), accel.EasyCache(threshold=0)):
        assert torch.equal(run(tiny), baseline)
    assert all("_accel" not in name for m in tiny.pipe.transformer.modules() for name in vars(m))


@pytest.mark.parametrize("family", ["flux", "sd3", "dit"])
def test_it_is_refused_without_cross_attention(family) -> None:
    tiny, baseline = built(family)
    with pytest.raises(accel.AccelError, match="cross-attention"):
        accel.patch(tiny.pipe, accel.TextCache())
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=1)):
        assert torch.equal(run(tiny), baseline)
