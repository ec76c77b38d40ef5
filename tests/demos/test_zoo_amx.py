"""bfloat16 training: its attention is torch's, and only autocast runs take it."""

import torch
from torch.nn import functional

from demos.zoo import amx


def test_attention_is_torchs_within_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 2, 12, 8, generator=generator).requires_grad_()
    wanted = functional.scaled_dot_product_attention(*states)
    made = amx.attention(*states)
    assert made.dtype == torch.bfloat16
    assert (made.float() - wanted).norm() < 0.02 * wanted.norm()
    (slope,) = torch.autograd.grad(wanted.square().sum(), states)
    (near,) = torch.autograd.grad(made.float().square().sum(), states)
    assert (near - slope).norm() < 0.03 * slope.norm()


def test_only_unmasked_attention_under_autocast_is_taken_over() -> None:
    states = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    before = functional.scaled_dot_product_attention
    wanted = before(states, states, states)
    with amx.quick([]):
        attend = functional.scaled_dot_product_attention
        assert torch.equal(attend(states, states, states), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert attend(states, states, states).dtype == torch.bfloat16
            masked = attend(states, states, states, attn_mask=mask)
            assert torch.equal(masked, before(states, states, states, attn_mask=mask))
    assert functional.scaled_dot_product_attention is before
