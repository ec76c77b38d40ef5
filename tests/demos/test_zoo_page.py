"""The page on the zoo holds what was measured, and what is measured of a run."""

import json

import numpy as np
import pytest
import torch

import accel
from accel import model_zoo
from demos.zoo import dynamics, page


def test_the_page_holds_the_figures_of_the_files() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.sections()) == text, "run `python -m demos.zoo.page`"


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    text = "before <!-- a:begin -->old<!-- a:end --> after"
    filled = page.filled(text, {"a": "new"})
    assert filled == "before <!-- a:begin -->\nnew\n<!-- a:end --> after"
    assert page.filled(filled, {"a": "new"}) == filled
    with pytest.raises(SystemExit, match="the marks of b are missing"):
        page.filled(text, {"b": "new"})


@pytest.mark.parametrize("name", ["emoji-unet", "emoji-video"])
def test_curves_of_a_run(name) -> None:
    pipe, call, _ = model_zoo.load(name)
    short = call | {"num_inference_steps": 6}
    found = dynamics.curves(accel.profile(pipe, ["apple on a blue background"], call=short))
    assert len(found["ratio"]) == 5 and len(found["cosine"]) == 6
    assert len(found["change"]) > 3
    assert all(len(values) == 5 for values in found["change"].values())
    assert all(-1 <= value <= 1.001 for value in found["cosine"])
    json.dumps(found)


def test_verdicts_tell_a_u_and_a_rise() -> None:
    steps = np.linspace(-1, 1, 49)
    found = {
        "ratio": [0.99] * 48 + [0.5],
        "change": {"block.0": (steps**2 + 0.1).tolist(), "block.1": (steps**2 + 0.3).tolist()},
        "cosine": np.linspace(0.8, 0.99, 50).tolist(),
    }
    seen = dynamics.verdicts(found)
    assert seen["ratio_median"] == 0.99 and seen["ratio_last"] == 0.5
    assert seen["ratio_share_near_one"] == pytest.approx(48 / 49)
    assert seen["change_least"] == pytest.approx(0.2)
    assert min(seen["change_first"], seen["change_last"]) > 0.8
    assert seen["cosine_rank_correlation"] == pytest.approx(1)


def test_an_autoencoder_that_gives_back_what_it_got_brighter() -> None:
    class Plain:
        def encode(self, pixels: torch.Tensor) -> "Plain":
            self.latent_dist, self.kept = self, pixels
            return self

        def mode(self) -> torch.Tensor:
            return self.kept

        def decode(self, latent: torch.Tensor) -> "Plain":
            self.sample = latent + 0.02
            return self

    class Pipe:
        vae = Plain()

    clips = torch.rand(2, 5, 3, 8, 8) * 0.9
    assert torch.allclose(dynamics.reconstructed(Pipe(), clips), clips + 0.01, atol=1e-6)
    assert dynamics.apart(clips[:, None].expand(2, 3, 5, 3, 8, 8)) == pytest.approx(0, abs=1e-3)
