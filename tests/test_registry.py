"""Models that no family describes: what is found by their structure."""

import torch
from tiny_pipelines import built, run

import accel
from accel import registry
from accel.chain import Chain

CYCLE = accel.PlainCycle(interval=2)


def test_unregistered_transformers_are_described_by_their_structure(monkeypatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", {})
    for family in ("ltx", "flux", "cogvideox", "sd3"):
        tiny, _ = built(family)
        with accel.patched(tiny.pipe, CYCLE) as handle:
            detected = run(tiny)
            assert handle.report().hit_rate == 0.5
        monkeypatch.undo()
        with accel.patched(tiny.pipe, CYCLE):
            assert torch.equal(run(tiny), detected)
        monkeypatch.setattr(registry, "FAMILIES", {})


def test_a_list_that_alternates_with_another_is_cached_by_itself(monkeypatch) -> None:
    """Of Latte's blocks structure finds the spatial ones; the last one's output is what counts."""
    tiny, wanted = built("latte")
    with accel.patched(tiny.pipe, CYCLE):
        described = (run(tiny) - wanted).norm()
    monkeypatch.setattr(registry, "FAMILIES", {})
    with accel.patched(tiny.pipe, accel.PlainCycle(interval=1)):
        assert torch.equal(run(tiny), wanted)
    with accel.patched(tiny.pipe, CYCLE) as handle:
        assert 0 < (run(tiny) - wanted).norm() < 1.2 * described
        assert handle.report().hit_rate > 0.3


class Unclear(torch.nn.Module):
    """A block whose two outputs are no streams that it takes."""

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor):
        return hidden_states + emb, emb + 1


class Unchained(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Unclear(), Unclear()])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = sum(block(hidden_states, hidden_states * 0.5))
        return hidden_states


def test_blocks_that_do_not_form_a_chain_are_left_alone(caplog) -> None:
    model = Unchained()
    chain = Chain(model, registry.family(model))
    hidden = torch.ones(1, 2, 3)
    for index, block in enumerate(model.blocks):
        arguments = chain.arguments(index, (hidden, hidden), {})
        chain.learn(index, arguments, block(hidden, hidden))
    assert not chain.known(0)
    assert "do not hand their outputs on" in caplog.text
