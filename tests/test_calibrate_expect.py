"""What is expected of candidates: the runs so far correct predictions and weigh early errors."""

import math
from dataclasses import replace

import pytest

import accel
from accel.calibrate_expect import Expected
from accel.calibrate_fit import Candidate
from accel.calibrate_replay import EARLY, USUAL, Prediction
from accel.calibrate_trials import Trial

DRIFTS = (
    (0.1, 0.2, 0.1, 0.05, 0.3),
    (0.03, 0.01, 0.05, 0.2, 0.02),
    (0.02, 0.05, 0.004, 0.01, 0.001),
    (0.001, 0.003, 0.01, 0.1, 0.2),
)


def candidate(drifts: tuple[float, ...], interval: int = 2, speedup: float = 2.0) -> Candidate:
    prediction = Prediction(drifts[USUAL], 0.5, 1.0, speedup, drifts=drifts)
    return Candidate((accel.PlainCycle(interval=interval),), prediction)


def run(psnr: float, speedup: float = 2.0) -> Trial:
    return Trial(prompt=0, psnr=psnr, seconds=1.0, untouched_seconds=speedup, share=0.5)


@pytest.mark.parametrize("weight", range(len(EARLY)))
def test_the_weight_that_explains_the_runs_is_found(weight: int) -> None:
    runs = [(candidate(each), run(7 - 20 * math.log10(each[weight]))) for each in DRIFTS]
    assert Expected(runs).early(candidate(DRIFTS[0]))[0] == weight
    unseen = candidate((0.01, 0.002, 0.03, 0.02, 0.005))
    wanted = 7 - 20 * math.log10(unseen.prediction.drifts[weight])
    assert Expected(runs).psnr(unseen) == pytest.approx(wanted)


def test_few_runs_say_nothing_of_weights() -> None:
    runs = [(candidate(each), run(7 - 20 * math.log10(each[0]))) for each in DRIFTS[:3]]
    for few in (runs, []):
        assert Expected(few).early(candidate(DRIFTS[0]))[0] == USUAL


def test_kinds_have_weights_of_their_own_once_enough_of_them_ran() -> None:
    across = [
        Candidate((accel.FitCache(across=True),), candidate(each).prediction) for each in DRIFTS
    ]
    runs = [(candidate(each), run(7 - 20 * math.log10(each[0]))) for each in DRIFTS]
    runs += [(each, run(1 - 20 * math.log10(each.prediction.drifts[4]))) for each in across]
    assert Expected(runs).early(candidate(DRIFTS[0]))[0] == 0
    assert Expected(runs).early(across[0])[0] == 4
    assert Expected(runs).psnr(across[1]) == pytest.approx(runs[5][1].psnr)


def test_speed_is_corrected_by_the_median_prompt_of_its_kind() -> None:
    """The untouched run of prompt 0 was slow, and predictions count as two prompts."""
    other = Candidate((accel.EasyCache(),), candidate(DRIFTS[0]).prediction)
    runs = [(candidate(each), run(30, speedup=3.8)) for each in DRIFTS]
    assert Expected([]).speedup(candidate(DRIFTS[0])) == 2.0
    assert Expected(runs).speedup(candidate(DRIFTS[0])) == 2.0
    for prompt in range(1, 5):
        runs.append((candidate(DRIFTS[1]), replace(run(30, speedup=1.8), prompt=prompt)))
        runs.append((other, replace(run(30, speedup=0.5), prompt=prompt)))
    assert Expected(runs).speedup(candidate(DRIFTS[0])) == pytest.approx(1.8)
    assert Expected(runs).speedup(other) == pytest.approx(0.5)
