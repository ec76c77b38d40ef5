"""Every cache beside stages of different size: tokens of mixed sizes, fewer pixels, on a U-Net."""

from __future__ import annotations

import pytest
import torch
from contract_cases import ACTIVE, IDENTITY, METHODS, applies, make
from tiny_pipelines import built, run

import accel

SMALLER = accel.BottleneckSampling(shares=(0.25, 0.5, 0.25), up=1.5)
STAGED = {
    "flux_cfg": accel.RALU(shares=(0.25, 0.125, 0.625), ends=(0.1, 0.3), jump=6.0, ratio=0.5),
    "wan21": SMALLER,
    "sd15": SMALLER,
}


@pytest.mark.parametrize("family", STAGED)
@pytest.mark.parametrize("name", METHODS)
def test_stages_beside_every_cache(name, family) -> None:
    """One that never reuses changes no bit; one that does starts anew and leaves nothing behind."""
    if not applies(name, family):
        with pytest.raises(accel.AccelError):
            accel.patch(built(family)[0].pipe, STAGED[family], make(name, ACTIVE))
        return
    tiny, untouched = built(family)
    with accel.patched(tiny.pipe, STAGED[family]):
        alone = run(tiny)
    with accel.patched(tiny.pipe, STAGED[family], make(name, IDENTITY)):
        assert torch.equal(run(tiny), alone)
    with accel.patched(tiny.pipe, STAGED[family], make(name, ACTIVE)) as handle:
        reused = run(tiny)
        assert handle.report().share_computed < 1
        assert torch.equal(run(tiny), reused)
    assert torch.isfinite(reused).all()
    assert torch.equal(run(tiny), untouched)
