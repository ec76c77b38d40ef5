"""Linear layers in fewer bits: formats against their definition, installing, LoRA, undoing."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY, built, run
from torch.nn import functional

import accel
from accel import Linear
from accel.kernels import linear
from accel.kernels.linear_formats import FORMATS, e4m3_rows, int4_groups, int8_rows
from accel.kernels.linear_weight import QuantisedWeight

ALL = {"least": 1, "backend": "own"}


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


def spiky(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Gaussian with two channels of large values, as activations have."""
    torch.manual_seed(seed)
    x = torch.randn(rows, columns)
    x[:, :2] *= 20
    return x


def parameters(pipe: Any) -> list[tuple[str, int, torch.Tensor]]:
    return [(n, id(p), p.detach().clone()) for n, p in denoiser(pipe).named_parameters()]


def same(before: list[Any], after: list[Any]) -> bool:
    return all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "bound"), [("w8a8", 0.025), ("fp8", 0.05), ("int8", 0.008), ("int4", 0.12)]
)
def test_formats_are_as_close_as_their_bits_allow(name, bound) -> None:
    x, weight, bias = spiky(33, 128), torch.randn(48, 128), torch.randn(48)
    quantised = QuantisedWeight.of(weight, name)
    output, exact = functional.linear(x, quantised, bias), functional.linear(x, weight, bias)
    error = float((output - exact).norm() / exact.norm())
    assert bound / 20 < error < bound


def test_rounding_is_within_half_a_step() -> None:
    x = spiky(7, 96)
    for quantise, step in ((int8_rows, 0.5), (e4m3_rows, 16)):
        values, scale = quantise(x)
        assert float(((values.float() * scale - x) / scale).abs().max()) <= step * 1.001
        assert torch.equal(quantise(torch.zeros(2, 8))[0].float(), torch.zeros(2, 8))
    packed, scale = int4_groups(x)
    assert packed.shape == (7, 48)
    error = (FORMATS["int4"].dequantise(packed, scale) - x).view(7, -1, 32).abs()
    assert bool((error <= scale[..., None] * 0.5 + 1e-6).all())


def test_int8_products_equal_integer_arithmetic() -> None:
    x, weight = spiky(9, 64), torch.randn(16, 64)
    rows, row_scale = int8_rows(x)
    values, scale = int8_rows(weight)
    integers = rows.to(torch.int64) @ values.to(torch.int64).T
    expected = integers.double() * row_scale.double() * scale[:, 0].double()
    output = FORMATS["w8a8"].linear(x, values, scale, None)
    torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tiny", TINY, indirect=True)
@pytest.mark.parametrize("name", FORMATS)
def test_installs_in_every_family_and_restores_the_same_parameters(name, tiny, baseline) -> None:
    family = next(key for key in TINY if built(key)[0] is tiny)
    before = parameters(tiny.pipe)
    with accel.patched(tiny.pipe, Linear(name, **ALL)):
        modules = list(denoiser(tiny.pipe).modules())
        count = sum(isinstance(getattr(m, "weight", None), QuantisedWeight) for m in modules)
        assert count >= 4
        result = run(tiny, num_inference_steps=2)
        assert torch.isfinite(result).all()
    assert same(before, parameters(tiny.pipe))
    assert torch.equal(run(tiny), baseline(family))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "int3"}, "format must be one of w8a8, fp8, int8, int4"),
        ({"backend": "magic"}, "backend must be one of"),
        ({"least": 0}, "least must be"),
        ({"layers": "*"}, "layers must be a tuple"),
        ({"skip": (1,)}, "skip must be a tuple"),
    ],
)
def test_wrong_settings_are_refused(settings, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        Linear(**settings)


def test_nothing_to_exchange_is_an_error() -> None:
    tiny, _ = built("flux")
    for settings in ({"least": 4096}, {"layers": ("nothing",)}):
        with pytest.raises(accel.AccelError, match="no linear layer of the blocks of Flux"):
            accel.patch(tiny.pipe, Linear(**settings))
    assert "_accel_patch" not in tiny.pipe.__dict__


def test_chosen_layers_only() -> None:
    tiny, _ = built("sd3")
    with accel.patched(tiny.pipe, Linear("int8", layers=("*.to_q",), **ALL)):
        found = {
            name.rsplit(".", 1)[1]
            for name, module in tiny.pipe.transformer.named_modules()
            if isinstance(getattr(module, "weight", None), QuantisedWeight)
        }
    assert found == {"to_q"}


def test_already_quantised_layers_are_left_alone() -> None:
    tiny, _ = built("flux")
    with (
        accel.patched(tiny.pipe, Linear("int8", **ALL)),
        pytest.raises(accel.AccelError, match="no linear layer"),
    ):
        Linear("int4", **ALL).attach(tiny.pipe.__dict__["_accel_patch"]._denoisers[0])


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_stays_usable(when) -> None:
    from peft import LoraConfig

    tiny = TINY["flux"]()
    module, expected = tiny.pipe.transformer, run(tiny)

    def load() -> None:
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        module.add_adapter(config)

    if when == "before":
        load()
    patch = accel.patch(tiny.pipe, Linear("int8", **ALL))
    if when == "after":
        load()
    with_lora = run(tiny)
    module.disable_adapters()
    without = run(tiny)
    module.enable_adapters()
    assert not torch.allclose(with_lora, without, rtol=1e-2)
    assert float((without - expected).norm() / expected.norm()) < 0.05
    with pytest.raises(accel.AccelError, match=r"accel.Linear.*unpatch first"):
        module.fuse_lora()
    patch.remove()
    module.disable_adapters()
    assert torch.equal(run(tiny), expected)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", [accel.FORA(interval=2), accel.PlainCycle(), accel.Attention()])
def test_composes(order, other) -> None:
    tiny, latents = built("flux")
    with accel.patched(tiny.pipe, *(Linear("int8", **ALL), other)[::order]):
        result = run(tiny)
    assert float((result - latents).norm() / latents.norm()) < 0.2
    assert torch.equal(run(tiny), latents)


def test_moves_and_copies() -> None:
    weight = QuantisedWeight.of(spiky(8, 64), "w8a8")
    layer = torch.nn.Linear(64, 8, bias=False)
    layer._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
    x = spiky(3, 64)
    expected = layer(x)
    twin = copy.deepcopy(layer).to("cpu")
    assert torch.equal(twin(x), expected)
    half = layer.to(torch.float16)
    assert half.weight.dtype == torch.float16
    assert half.weight.codes.dtype == torch.int8
    assert half(x.half()).dtype == torch.float16
    with pytest.raises(accel.AccelError, match="unpatch first"):
        _ = layer.weight + 1


@pytest.mark.parametrize("backend", ["own", "torchao"])
def test_weights_come_back_where_the_model_was_moved_to(backend) -> None:
    if backend == "torchao":
        pytest.importorskip("torchao")
    tiny = TINY["flux"]()
    module = tiny.pipe.transformer
    own = {name: id(value) for name, value in module.named_parameters()}
    with accel.patched(tiny.pipe, Linear("int8", least=16, backend=backend)):
        tiny.pipe.to(torch.bfloat16)
    assert {value.dtype for value in module.parameters()} == {torch.bfloat16}
    assert {name: id(value) for name, value in module.named_parameters()} == own
    assert torch.isfinite(run(tiny, num_inference_steps=2)).all()


def test_quantised_weights_are_not_saved(tmp_path) -> None:
    tiny, _ = built("flux")
    with (
        accel.patched(tiny.pipe, Linear("int8", **ALL)),
        pytest.raises(accel.AccelError, match=r"accel.Linear quantised; unpatch first"),
    ):
        tiny.pipe.transformer.save_pretrained(tmp_path)
    tiny.pipe.transformer.save_pretrained(tmp_path)


def test_group_offload_and_quantised_weights_refuse_each_other() -> None:
    """Its hooks set `data`, which would leave what stands for the weight where it was."""
    cpu = torch.device("cpu")
    tiny = TINY["flux"]()
    with accel.patched(tiny.pipe, Linear("int8", **ALL)):
        module = next(m for m in tiny.pipe.transformer.modules() if _quantised(m))
        with pytest.raises(accel.AccelError, match="to offload them by groups"):
            module.weight.data = module.weight.to(cpu)
        tiny.pipe.transformer.to(torch.float64).to(torch.float32)
    tiny.pipe.transformer.enable_group_offload(cpu, cpu, "leaf_level")
    with pytest.raises(accel.AccelError, match="group offload keeps its own list"):
        accel.patch(tiny.pipe, Linear("int8", **ALL))


def _quantised(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), QuantisedWeight)


def test_torchao_says_why_it_does_not_serve(monkeypatch) -> None:
    pytest.importorskip("torchao")
    cpu = torch.device("cpu")
    assert "gains nothing" in str(linear.torchao_why_not("w8a8", cpu))
    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(linear.torchao_why_not("w8a8", cpu))
    tiny, _ = built("flux")
    with pytest.raises(accel.AccelError, match="torchao is not installed"):
        accel.patch(tiny.pipe, Linear("w8a8", backend="torchao", least=1))


@pytest.mark.parametrize("name", ["w8a8", "int8"])
def test_torchao_and_our_reference_agree(name, caplog) -> None:
    pytest.importorskip("torchao")
    tiny, latents = built("sd3")
    before = parameters(tiny.pipe)
    with caplog.at_level(logging.INFO, "accel"):
        with accel.patched(tiny.pipe, Linear(name, backend="torchao", least=1)):
            by_torchao = run(tiny)
        with accel.patched(tiny.pipe, Linear(name, **ALL)):
            by_us = run(tiny)
    assert float((by_us - by_torchao).norm() / latents.norm()) < 0.03
    assert same(before, parameters(tiny.pipe))
    assert "slower than before" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 333])
def test_w8a8_on_a_gpu(rows) -> None:
    from accel.kernels.linear_w8a8 import w8a8

    x, weight = spiky(rows, 200).cuda().half(), torch.randn(75, 200, device="cuda")
    values, scale = int8_rows(weight)
    expected = FORMATS["w8a8"].linear(x.float(), values, scale, None)
    torch.testing.assert_close(w8a8(x, values, scale).float(), expected, rtol=2e-3, atol=2e-2)
