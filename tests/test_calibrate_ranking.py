"""The predicted error ranks candidates as their measured error does, on the trained models."""

from __future__ import annotations

import numpy as np
import pytest

import accel
from accel import generate, model_zoo
from accel.calibrate_profile import profile
from accel.calibrate_replay import Replay
from accel.calibrate_trials import psnr
from benchmarks.calibration_ranking import grid

STEPS = 25


@pytest.mark.slow
@pytest.mark.parametrize("name", model_zoo.names())
def test_candidates_are_ranked_as_they_were_measured(name) -> None:
    pipe, call, _ = model_zoo.load(name)
    call |= {"num_inference_steps": STEPS}
    if "num_frames" in call:
        call |= {"num_frames": 9}  # for time; it was trained at several lengths
    prompt = model_zoo.prompts(name, "heldout").read_text().splitlines()[0]
    kept = []
    made = profile(
        pipe, [prompt], call=call, run=lambda c, s: kept.append(generate.make(pipe, c, s)[0])
    )
    replay, pairs = Replay(made.prompts[0]), []
    for each in grid():
        found = replay.predict(*each)
        with accel.patched(pipe, *found.settled):
            picture = generate.make(pipe, call | {"prompt": prompt}, 0)[0]
        pairs.append((-np.log(found.error), psnr(picture, kept[0])))
    ranks = [np.argsort(np.argsort(column)) for column in zip(*pairs, strict=True)]
    assert np.corrcoef(*ranks)[0, 1] >= 0.8, pairs
