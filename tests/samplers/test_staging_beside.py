"""Stages of different size beside caches, guidance policies, LoRA and compiled blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import TINY, Tiny, built, run

import accel
from accel import BottleneckSampling

LARGER = {"ltx": {"height": 64, "width": 64}}
STAGES = BottleneckSampling(shares=(0.25, 0.5, 0.25), up=1.5)
RALU = accel.RALU(shares=(0.25, 0.25, 0.5), ends=(0.1, 0.3), jump=6.0, ratio=0.5)
CYCLE = accel.PlainCycle(interval=3, reuse=accel.Taylor(order=1))
MAGNITUDES = accel.MagCache(threshold=0.5, max_skips=3, ratios=(1.0, *(0.99,) * 7))


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *(("flux_cfg", CYCLE), ("wan22", CYCLE), ("sd15", CYCLE)),
        *(("flux_cfg", MAGNITUDES), ("wan21", MAGNITUDES), ("ltx", MAGNITUDES)),
        *(("sd15", accel.FORA(interval=3)), ("sd15", accel.TGate())),
    ],
)
def test_caches_start_again_with_each_stage(name, cache) -> None:
    """Steps 2 and 6 begin stages: their first denoiser call is computed."""
    tiny, _ = built(name)
    with accel.patched(tiny.pipe, STAGES, cache) as handle:
        first = run(tiny, **LARGER.get(name, {}))
        rows = handle.report().rows
        assert torch.equal(run(tiny, **LARGER.get(name, {})), first)
    starts = {row.verdict for row in rows if row.step in (0, 2, 6) and row.verdict != "left out"}
    assert starts == {"computed"}
    assert torch.isfinite(first).all()
    assert len({row.verdict for row in rows}) > 1


@pytest.mark.parametrize("name", ["flux_cfg", "wan21", "sd15", "sd3"])
@pytest.mark.parametrize("policy", [accel.CfgCache(interval=3, start=0.0)])
def test_guidance_policies_start_again_with_each_stage(name, policy) -> None:
    tiny, _ = built(name)
    with accel.patched(tiny.pipe, STAGES, policy, accel.PlainCycle(interval=2)) as handle:
        first = run(tiny)
        rows = handle.report().rows
    left_out = {row.step for row in rows if row.verdict == "left out"}
    assert left_out
    assert not left_out & {0, 2, 6}
    assert torch.isfinite(first).all()


@pytest.mark.parametrize(
    ("name", "method"), [("wan21", STAGES), ("flux_cfg", RALU), ("flux_cfg", STAGES)]
)
def test_a_lora_acts_in_every_stage(name, method) -> None:
    tiny = TINY[name]()
    with accel.patched(tiny.pipe, method, accel.PlainCycle(interval=2)):
        plain = run(tiny)
        torch.manual_seed(3)
        tiny.pipe.transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
        acting = run(tiny)
        assert torch.equal(run(tiny), acting)
        assert not torch.allclose(acting, plain)
        tiny.pipe.transformer.disable_adapters()
        assert torch.equal(run(tiny), plain)
    assert torch.equal(run(tiny), built(name)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "methods", "sizes"),
    [
        ("wan21", (STAGES,), 2),
        ("wan21", (STAGES, accel.PlainCycle(interval=2)), 2),
        ("flux", (STAGES,), 2),
        ("flux", (RALU, accel.PlainCycle(interval=2)), 3),
    ],
)
def test_compiled_blocks_have_one_graph_for_each_size(name, methods, sizes) -> None:
    """As many a size as an untouched run has, without breaks; a second run compiles nothing."""
    plain, graphs = compiled(name)
    run(plain)
    alone = len(graphs)
    tiny = TINY[name]()
    with accel.patched(tiny.pipe, *methods):
        wanted = run(tiny)
    tiny, graphs = compiled(name)
    with accel.patched(tiny.pipe, *methods):
        assert torch.allclose(run(tiny), wanted, atol=1e-4)
        assert len(graphs) == sizes * alone
        run(tiny)
        assert len(graphs) == sizes * alone, "a second run made it compile again"
    torch._dynamo.reset()


def compiled(name: str) -> tuple[Tiny, list[Any]]:
    """A new pipeline with compiled blocks, and the graphs as they come."""
    graphs: list[Any] = []

    def count(module, example_inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    tiny = TINY[name]()
    tiny.pipe.transformer.compile_repeated_blocks(backend=count, fullgraph=True, dynamic=False)
    return tiny, graphs
