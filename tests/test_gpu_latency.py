"""The benchmark of large models: their real sizes, and that every row of it runs."""

import json
import sys

import pytest

from benchmarks.gpu import latency, real_sizes

BILLIONS = {
    "FLUX.1-dev, 1024x1024": 11.9,
    "SD3.5-large, 1024x1024": 8.1,
    "SDXL, 1024x1024": 2.6,
    "Wan 2.1 1.3B, 480x832x81": 1.4,
    "LTX-Video, 512x704x161": 1.9,
    "CogVideoX-5B, 480x720x49": 5.6,
    "Qwen-Image, 1328x1328": 20.4,
    "Wan 2.1 14B, 480x832x81": 14.3,
    "HunyuanVideo, 544x960x61": 12.8,
}
"""Parameters of the published denoisers."""


@pytest.mark.parametrize("name", real_sizes.MODELS)
def test_a_denoiser_has_the_published_number_of_parameters(name):
    model = real_sizes.MODELS[name]
    denoiser = model.build_denoiser(model.settings, "meta")
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], abs=0.06)


@pytest.mark.parametrize("name", real_sizes.MODELS)
def test_every_plan_runs_on_a_narrow_copy(name):
    """No row fails but for a reason that a method gave, and shares are those of the plans."""
    found = {row["row"]: row for row in latency.rows(real_sizes.MODELS[name], "cpu")}
    assert not [row for row in found.values() if "failed" in row]
    assert found["hooks, nothing reused"]["share_computed"] == 1
    assert found["whole calls, one of four"]["share_computed"] == pytest.approx(0.25)
    assert ("guidance branch reused" in found) == real_sizes.MODELS[name].branches


def test_models_in_the_file_are_kept(tmp_path, monkeypatch, capsys):
    path, first = tmp_path / "latency.json", next(iter(real_sizes.MODELS))
    arguments = ["latency", str(path), "--smoke", "--models", first]
    monkeypatch.setattr(sys, "argv", arguments)
    latency.main()
    before = json.loads(path.read_text())
    assert first in capsys.readouterr().out
    latency.main()
    assert capsys.readouterr().out == ""
    assert json.loads(path.read_text()) == before
