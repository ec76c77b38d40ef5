"""Attention kernels, in Triton's interpreter and as references, against fp64 on uneasy inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import accel
from accel.kernels.attention_inputs import why_not
from accel.kernels.block_sparse_attention import block_sparse_attention
from accel.kernels.flash_attention import flash_attention
from accel.kernels.sage_attention import sage_int4, sage_int8, sage_int8_fp8
from accel.kernels.sage_attention_quantise import SMOOTH_KEY, Smoothing

triton = pytest.importorskip("triton", reason="pip install triton")
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="a GPU is here: kernels run on it in the gpu tests"
)
SHAPES = {
    "even": {"queries": 64, "keys": 64},
    "odd": {"queries": 37, "keys": 83},
    "one key": {"queries": 5, "keys": 1},
    "gqa": {"queries": 40, "keys": 70, "heads": 4, "key_heads": 2},
    "dim 72": {"queries": 33, "keys": 50, "dim": 72},
    "dim 128": {"queries": 33, "keys": 50, "dim": 128},
    "long": {"queries": 140, "keys": 200},
}
NOT_SMOOTHED = Smoothing(query=False, key=False, value=False)


def inputs(queries, keys, heads=2, key_heads=None, dim=64, seed=0) -> list[Tensor]:
    """Fresh tensors whose keys share large offsets in some channels, as trained models' do."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int, tokens: int) -> Tensor:
        return torch.randn(2, count, tokens, dim, generator=generator)

    query, key, value = drawn(heads, queries), drawn(key_heads or heads, keys), drawn(2, keys)
    if value.shape[1] != key.shape[1]:
        value = drawn(key.shape[1], keys)
    key[..., ::8] += 12 * torch.randn(dim // 8, generator=generator)
    return [query, key, value]


def exact(query, key, value, mask=None, is_causal=False) -> Tensor:
    """Plain softmax attention in fp64; a query that sees no key gives 0."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1).double() for x in (key, value))
    scores = query.double() @ key.mT / query.shape[-1] ** 0.5
    seen = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        seen &= mask
    if is_causal:
        seen &= torch.ones(seen.shape[-2:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return weights @ value


def errors(made: Tensor, right: Tensor) -> tuple[float, float]:
    """Cosine, and mean absolute error as a share of the mean size."""
    made = made.double()
    cosine = torch.cosine_similarity(made.flatten(), right.flatten(), dim=0)
    return float(cosine), float((made - right).abs().mean() / right.abs().mean())


def padding(keys: int) -> Tensor:
    """A key mask (batch, 1, 1, keys) that hides the end of the second row's keys."""
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., keys // 2 :] = False
    return mask


@pytest.mark.parametrize("way", [pytest.param("triton", marks=interpreted), "reference"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_flash_attention_is_exact(name, is_causal, way) -> None:
    tensors = inputs(**SHAPES[name])
    if way == "triton":
        from accel.kernels.flash_attention_triton import flash_attention_triton as attend
    else:
        attend = flash_attention
    made = attend(*tensors, is_causal=is_causal)
    assert (made.double() - exact(*tensors, is_causal=is_causal)).abs().max() < 1e-5


@interpreted
def test_flash_attention_masks_padded_keys() -> None:
    from accel.kernels.flash_attention_triton import flash_attention_triton

    tensors, mask = inputs(37, 50), padding(50)
    made = flash_attention_triton(*tensors, attn_mask=mask)
    assert (made.double() - exact(*tensors, mask)).abs().max() < 1e-5


@pytest.mark.parametrize("way", [pytest.param("triton", marks=interpreted), "reference"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "one key"])
def test_int8_products_stay_close(name, is_causal, way) -> None:
    tensors = inputs(**SHAPES[name])
    if way == "triton":
        from accel.kernels.sage_attention_triton import sage_triton

        settings = {"attn_mask": None, "scale": None, "smoothing": SMOOTH_KEY}
        made = sage_triton(*tensors, is_causal=is_causal, fp8=False, **settings)
    else:
        made = sage_int8(*tensors, is_causal=is_causal)
    cosine, error = errors(made, exact(*tensors, is_causal=is_causal))
    assert cosine >= 0.999
    assert error <= 0.03


@interpreted
@pytest.mark.parametrize("sums", ["fp32", "fp16"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "one key"])
def test_e4m3_products_stay_close(name, is_causal, sums, monkeypatch) -> None:
    """Both ways to sum them; for fp16 sums V is scaled otherwise than in the reference."""
    from accel.kernels import sage_attention_triton

    monkeypatch.setattr(sage_attention_triton, "sums_in_fp16", lambda _: sums == "fp16")
    tensors = inputs(**SHAPES[name])
    settings = {"attn_mask": None, "scale": None, "smoothing": SMOOTH_KEY}
    made = sage_attention_triton.sage_triton(*tensors, is_causal=is_causal, fp8=True, **settings)
    cosine, error = errors(made, exact(*tensors, is_causal=is_causal))
    assert cosine >= 0.998
    assert error <= 0.05
    reference = sage_int8_fp8(*tensors, is_causal=is_causal)
    assert errors(made, reference.double())[1] <= (0.02 if sums == "fp32" else 0.05)


@pytest.mark.parametrize(("kernel", "bar"), [(sage_int8, 0.03), (sage_int8_fp8, 0.05)])
def test_smoothing_is_needed(kernel, bar) -> None:
    tensors = inputs(64, 96)
    right = exact(*tensors)
    assert errors(kernel(*tensors), right)[1] <= bar
    assert errors(kernel(*tensors, smoothing=NOT_SMOOTHED), right)[1] > bar


def test_every_smoothing_leaves_exact_arithmetic_alone() -> None:
    tensors = inputs(40, 70)
    right = exact(*tensors)
    for smoothing in (
        Smoothing(query=True),
        Smoothing(value=True),
        Smoothing(query=True, value=True),
    ):
        assert errors(sage_int8(*tensors, smoothing=smoothing), right)[1] <= 0.03


def test_four_bits_cost_much_more() -> None:
    tensors = inputs(64, 96)
    right = exact(*tensors)
    assert errors(sage_int4(*tensors), right)[1] > 3 * errors(sage_int8(*tensors), right)[1]


@pytest.mark.parametrize("kernel", [sage_int8, sage_int8_fp8, flash_attention])
def test_masks_and_layouts(kernel) -> None:
    tensors, mask = inputs(37, 50), padding(50)
    made = kernel(*tensors, attn_mask=mask)
    assert errors(made, exact(*tensors, mask))[0] >= 0.998
    other = kernel(*(x.transpose(1, 2) for x in tensors), attn_mask=mask, layout="NHD")
    assert torch.allclose(other.transpose(1, 2), made, atol=1e-5)


@pytest.mark.parametrize("way", [pytest.param("triton", marks=interpreted), "reference"])
@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for name in ("even", "odd", "gqa") for block in (16, 32)] + [("long", 128)],
)
def test_block_sparse_attention_is_exact_on_its_blocks(name, block, way) -> None:
    tensors = inputs(**SHAPES[name])
    queries, keys, heads = tensors[0].shape[2], tensors[1].shape[2], tensors[0].shape[1]
    rows, columns = (-(-count // block) for count in (queries, keys))
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand(2, heads, rows, columns, generator=generator) < 0.5
    blocks[0, 0, 0] = False  # a row that keeps nothing
    whole = blocks.repeat_interleave(block, 2).repeat_interleave(block, 3)
    if way == "triton":
        from accel.kernels.block_sparse_attention_triton import block_sparse_triton as attend
    else:
        attend = block_sparse_attention
    made = attend(*tensors, blocks, block_size=block)
    right = exact(*tensors, whole[:, :, :queries, :keys])
    assert (made.double() - right).abs().max() < 1e-5
    assert not made[0, 0, :block].any()


def test_on_a_cpu_the_reference_runs_and_says_why() -> None:
    assert "cuda" in why_not(torch.zeros(1, 1, 1, 64)).lower()


@pytest.mark.parametrize(
    ("mask", "block", "message"),
    [
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), 48, "accepted are 16"),
        (torch.ones(1, 1, 3, 2, dtype=torch.bool), 32, "must be bool"),
        (torch.ones(1, 1, 2, 2), 32, "must be bool"),
    ],
)
def test_wrong_block_masks_are_named(mask, block, message) -> None:
    with pytest.raises(accel.AccelError, match=message):
        block_sparse_attention(*inputs(64, 64), mask, block_size=block)
