"""The attention method: every family's layers are reached and restored; falls back with reasons."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_fakes import EMULATED, Fake, a_call
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_pipelines import TINY, built, run
from torch.nn import functional

import accel
from accel import Attention
from accel.attention_calls import AttentionCall, AttentionLayer, Interception, attention_layers
from accel.kernels import attention, attention_fastest
from accel.kernels.attention_table import KERNELS, LOSSLESS, TorchBackend

SAME = 2e-5


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def processors(pipe: Any) -> list[tuple[type, list[str]]]:
    found = attention_layers(denoiser(pipe))
    return [(type(each.module.processor), sorted(each.module.processor.__dict__)) for each in found]


@pytest.mark.parametrize("tiny", TINY, indirect=True)
def test_every_layer_of_every_family_is_reached_and_restored(tiny, baseline, monkeypatch) -> None:
    """Values of zero in every attention are seen at the end; torch's own attention is bit-exact."""
    name = next(key for key in TINY if built(key)[0] is tiny)
    before = processors(tiny.pipe)
    with accel.patched(tiny.pipe, Attention("sdpa")):
        assert torch.equal(run(tiny), baseline(name))
    seen: set[str] = set()

    def nothing(call: AttentionCall) -> torch.Tensor:
        seen.add(call.layer.name)
        return torch.zeros_like(call.plain())

    monkeypatch.setitem(KERNELS, "math", Fake(nothing))
    with accel.patched(tiny.pipe, Attention("math")):
        assert not torch.allclose(run(tiny), baseline(name), rtol=1e-3)
    assert seen == {layer.name for layer in attention_layers(denoiser(tiny.pipe))}
    assert processors(tiny.pipe) == before
    assert torch.equal(run(tiny), baseline(name))


@pytest.mark.parametrize("tiny", ["flux", "sd3", "pixart", "mochi", "sd15"], indirect=True)
def test_another_exact_kernel_changes_rounding_only(tiny, baseline) -> None:
    name = next(key for key in TINY if built(key)[0] is tiny)
    with accel.patched(tiny.pipe, Attention("math")):
        assert distance(run(tiny), baseline(name)) < SAME


@pytest.mark.parametrize("tiny", ["flux", "wan21", "cogvideox", "sd15"], indirect=True)
@pytest.mark.parametrize("kernel", ["sage_int8", "sage_int8_fp8"])
def test_low_bit_references_stay_close(kernel, tiny, monkeypatch) -> None:
    """Each attention by itself: random weights amplify from layer to layer."""
    low_bit, distances = KERNELS[kernel], list[float]()

    def compare(call: AttentionCall) -> torch.Tensor:
        exact = call.plain()
        distances.append(float((low_bit.run(call) - exact).abs().sum() / exact.abs().sum()))
        return exact

    monkeypatch.setitem(KERNELS, kernel, Fake(compare))
    with accel.patched(tiny.pipe, Attention(kernel)):
        run(tiny, num_inference_steps=2)
    assert distances
    assert 0 < max(distances) < 0.06


def test_chosen_layers_only(monkeypatch) -> None:
    tiny, _ = built("pixart")
    seen: set[str] = set()

    def look(call: AttentionCall) -> torch.Tensor:
        seen.add(call.layer.name)
        return call.plain()

    kernel = Fake(look)
    monkeypatch.setitem(KERNELS, "math", kernel)
    with accel.patched(tiny.pipe, Attention("math", layers=("*.attn1",))):
        run(tiny, num_inference_steps=2)
    assert kernel.asked == 1  # all these layers have one shape
    names = {layer.name for layer in attention_layers(tiny.pipe.transformer)}
    assert seen == {name for name in names if name.endswith(".attn1")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "int3"}, "kernel must be one of auto"),
        ({"layers": ()}, "layers must be a tuple of name patterns"),
        ({"layers": "*.attn1"}, "layers must be a tuple of name patterns"),
        ({"least": 0}, "least must be"),
        ({"similarity": 1.5}, "similarity must be"),
        ({"error": -1}, "error must be"),
        ({"plan": {"a": ("sdpa",)}}, "5 kernels out of"),
        ({"plan": {"a": ("int3",) * 5}}, "5 kernels out of"),
    ],
)
def test_wrong_settings_are_refused(settings, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        Attention(**settings)


def test_no_such_layer_leaves_the_pipeline_alone() -> None:
    tiny, _ = built("flux")
    before = processors(tiny.pipe)
    with pytest.raises(accel.AccelError, match=r"no attention layer of FluxTransformer2DModel"):
        accel.patch(tiny.pipe, Attention(layers=("*.attn7",)))
    assert processors(tiny.pipe) == before
    assert "_accel_patch" not in tiny.pipe.__dict__


def test_what_cannot_run_here_is_said_once_and_stays_exact(baseline, caplog) -> None:
    tiny, _ = built("flux")
    for settings, reason in (
        ({"kernel": "sage_int8", "least": 1}, "not torch.float32"),
        ({"kernel": "sage_int8"}, "fewer than 1024"),
        ({"kernel": "flash_attn"}, "flash-attn"),
        ({"kernel": "cudnn"}, "torch has no such attention on cpu"),
    ):
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING, "accel"),
            accel.patched(tiny.pipe, Attention(**settings)),
        ):
            assert torch.equal(run(tiny), baseline("flux"))
        said = [record.message for record in caplog.records if "Attention" in record.message]
        assert len(said) == 1
        assert reason in said[0]


def test_a_kernel_that_breaks_does_not_break_the_run(baseline, caplog, monkeypatch) -> None:
    def broken(call: AttentionCall) -> torch.Tensor:
        raise RuntimeError("no instruction for this")

    monkeypatch.setitem(KERNELS, "math", Fake(broken))
    tiny, _ = built("flux")
    with caplog.at_level(logging.WARNING, "accel"), accel.patched(tiny.pipe, Attention("math")):
        assert torch.equal(run(tiny), baseline("flux"))
    assert sum("no instruction for this" in record.message for record in caplog.records) == 1


def test_masks_that_differ_by_head_stay_with_torch() -> None:
    tiny, latents = built("ltx")  # its cross-attention has one mask row for each head
    with accel.patched(tiny.pipe, Attention("sage_int8", layers=("*.attn2",), **EMULATED)):
        assert torch.equal(run(tiny), latents)


def test_auto_pins_the_fastest_that_is_right(monkeypatch, caplog) -> None:
    call = a_call()
    kernels = {
        "slow": Fake(lambda call: call.plain()),
        "fast": Fake(lambda call: call.plain()),
        "wrong": Fake(lambda call: call.plain() * 1.1),
        "absent": Fake(lambda call: 1 / 0, "is not installed"),
        "broken": Fake(lambda call: 1 / 0),
    }
    times = iter([3.0, 3.0, 1.0])
    for name, kernel in kernels.items():
        monkeypatch.setitem(KERNELS, name, kernel)
    monkeypatch.setattr(attention_fastest, "_seconds", lambda run, like: next(times))
    fastest = attention_fastest.Fastest(["sdpa", *kernels])
    with caplog.at_level(logging.WARNING, "accel"):
        assert fastest.name(call) == "fast"
    assert "wrong gave wrong values" in caplog.text
    assert fastest.name(call) == "fast"  # known: nothing is timed again
    times = iter([3.0, 2.9])
    again = attention_fastest.Fastest(["sdpa", "slow"])
    assert again.name(call) == "sdpa"  # a gain within the noise changes nothing


def test_auto_pins_nothing_by_values_that_are_not_finite(monkeypatch) -> None:
    """A prompt that overflowed must not end the run, nor choose for the next one."""
    monkeypatch.setitem(KERNELS, "other", Fake(lambda call: call.plain()))
    times = iter([3.0, 1.0])
    monkeypatch.setattr(attention_fastest, "_seconds", lambda run, like: next(times))
    fastest = attention_fastest.Fastest(["sdpa", "other"])
    call = a_call()
    lost = replace(call, plain=lambda: torch.full_like(call.query, torch.nan))
    assert fastest.name(lost) == "sdpa"
    assert fastest.name(call) == "other"


def test_auto_is_exact_on_this_machine(baseline) -> None:
    tiny, _ = built("wan21")
    with accel.patched(tiny.pipe, Attention()):
        assert distance(run(tiny), baseline("wan21")) < SAME


@pytest.mark.parametrize("cache", [accel.FORA(interval=2), accel.PlainCycle(interval=2)])
@pytest.mark.parametrize("order", [1, -1])
def test_composes_with_caches(cache, order) -> None:
    tiny, _ = built("flux")
    with accel.patched(tiny.pipe, cache):
        alone = run(tiny)
    methods = (cache, Attention("math"))[::order]
    with accel.patched(tiny.pipe, *methods):
        assert distance(run(tiny), alone) < SAME


def test_lora_works_inside() -> None:
    """Loaded while patched; the same as without the patch."""
    from peft import LoraConfig

    tiny = TINY["flux"]()
    with accel.patched(tiny.pipe, Attention("math")):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        tiny.pipe.transformer.add_adapter(config)
        inside = run(tiny)
    assert distance(inside, run(tiny)) < SAME
    tiny.pipe.transformer.disable_adapters()
    assert distance(inside, run(tiny)) > 0.01


def test_follows_exchanged_processors_and_backends() -> None:
    """A processor set after patching, and a vendor's backend set on one layer, are reached too."""
    tiny = TINY["sd15"]()
    expected = run(tiny)
    patch = accel.patch(tiny.pipe, Attention("sage_int8", **EMULATED))
    first = run(tiny)
    tiny.pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(run(tiny), first)
    patch.remove()
    assert torch.equal(run(tiny), expected)
    flux = TINY["flux"]()
    for layer in attention_layers(flux.pipe.transformer):
        layer.module.processor._attention_backend = "_native_math"
    with accel.patched(flux.pipe, Attention("sage_int8", **EMULATED)):
        changed = run(flux)
    reached = {
        layer.module.processor._attention_backend
        for layer in attention_layers(flux.pipe.transformer)
    }
    assert reached == {"_native_math"}
    assert distance(changed, run(flux)) > 0


def test_one_processor_for_all_layers() -> None:
    """`set_attn_processor(one)` shares an object between layers; each call finds its own layer."""
    tiny = TINY["sd15"]()
    tiny.pipe.unet.set_attn_processor(AttnProcessor2_0())
    seen: set[str] = set()

    def look(call: AttentionCall) -> torch.Tensor:
        seen.add(call.layer.name)
        return call.plain()

    interception = Interception(attention_layers(tiny.pipe.unet), look)
    run(tiny, num_inference_steps=1)
    interception.remove()
    assert seen == {layer.name for layer in attention_layers(tiny.pipe.unet)}
    assert interception.seen == seen


def test_training_is_left_alone() -> None:
    call = a_call()
    assert TorchBackend().why_not(call.query) is None
    tiny, _ = built("flux")
    layer = attention_layers(tiny.pipe.transformer)[0]
    asked: list[AttentionCall] = []

    def look(call: AttentionCall) -> torch.Tensor:
        asked.append(call)
        return call.plain()

    interception = Interception([layer], look)
    hidden = torch.randn(1, 8, 32, requires_grad=True)
    text = torch.randn(1, 4, 32)
    layer.module(hidden_states=hidden, encoder_hidden_states=text)
    assert not asked
    with torch.no_grad():
        layer.module(hidden_states=hidden.detach(), encoder_hidden_states=text)
    interception.remove()
    assert len(asked) == 1


@pytest.mark.slow
def test_compiled_blocks_still_reach_the_kernel(baseline, monkeypatch) -> None:
    tiny = TINY["sd3"]()
    expected = run(tiny)
    calls: list[str] = []

    def look(call: AttentionCall) -> torch.Tensor:
        calls.append(call.layer.name)
        return call.plain()

    monkeypatch.setitem(KERNELS, "math", Fake(look))
    for block in tiny.pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    with accel.patched(tiny.pipe, Attention("math")):
        assert distance(run(tiny), expected) < SAME
    assert len(calls) == 8 * len(set(calls))


def test_the_survey_names_every_kernel() -> None:
    found = Attention.survey(torch.zeros(1, 1, 1, 64))
    assert set(found) == set(KERNELS)
    assert found["sdpa"] == "runs"
    assert set(LOSSLESS) <= set(KERNELS)
    assert all(found[name] != "runs" for name in ("sage_int8", "sage_int8_fp8", "flash_attn"))
    assert set(attention.CHOICES) == {"auto", "adaptive", *KERNELS}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "math"])
def test_on_a_gpu_every_kernel_that_runs_is_close(kernel) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 2048, 128, device="cuda", dtype=torch.bfloat16)
    reason = KERNELS[kernel].why_not(query)
    if reason is not None:
        pytest.skip(reason)

    def plain() -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value)

    layer = AttentionLayer("attn", None)
    call = AttentionCall(layer, query, key, value, None, False, None, plain)
    given, exact = KERNELS[kernel].run(call).float(), plain().float()
    assert float((given - exact).abs().sum() / exact.abs().sum()) < 0.06
