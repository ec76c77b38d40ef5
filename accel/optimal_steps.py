"""Which steps to compute when the others are forecast from them: dynamic programming over pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]
_RIDGE = 1e-7
"""Of each regressor's square: two steps that say the same share the weight."""


def forecast_costs(gram: Costs, line: bool) -> Costs:
    """Squared relative error of step s forecast from computed steps i < j: entry [i, j, s].

    `gram`: inner products of what is forecast, (steps, steps). `line`: by the line through both,
    else by the value at j alone. Entries with i = j forecast from one step. 0 for s ≤ j.
    """
    count = len(gram)
    i, j, s = np.meshgrid(*[np.arange(count)] * 3, indexing="ij")
    ahead = np.where(i < j, (s - j) / np.maximum(j - i, 1), 0.0) if line else np.zeros(i.shape)
    new, old = 1 + ahead, -ahead
    error = (
        gram[s, s]
        - 2 * (new * gram[s, j] + old * gram[s, i])
        + new**2 * gram[j, j]
        + old**2 * gram[i, i]
        + 2 * new * old * gram[i, j]
    )
    return np.where(s > j, np.maximum(error, 0) / np.maximum(gram[s, s], 1e-12), 0.0)


def best_steps(costs: Costs, computes: int, minimax: bool) -> list[int]:
    """The `computes` steps, 0 among them, from which the others are forecast best.

    `costs`: see `forecast_costs`; their sum is made least, or with `minimax` the largest of them.
    """
    count = len(costs)
    gather = np.maximum.accumulate(costs, axis=2) if minimax else np.cumsum(costs, axis=2)
    until = np.concatenate((np.zeros((count, count, 1)), gather), axis=2)
    return cheapest_path(until, computes, minimax)


def cheapest_path(until: Costs, computes: int, minimax: bool = False) -> list[int]:
    """The `computes` steps, 0 among them, whose gaps cost least.

    `until` (steps, steps, steps + 1): entry [i, j, n] is the cost of forecasting all steps between
    j and n from the computed steps i and j; n = steps is the end of the run.
    """
    count = len(until)
    join = np.maximum if minimax else np.add
    best = np.full((count, count), np.inf)
    best[0, 0] = 0.0
    trail = []
    later = np.arange(count)[None, None, :] > np.arange(count)[None, :, None]
    for _ in range(computes - 1):
        reached = np.where(later, join(best[:, :, None], until[:, :, :count]), np.inf)
        trail.append(reached.argmin(axis=0))
        best = reached.min(axis=0)
    ends = join(best, until[:, :, count])
    i, j = (int(place) for place in np.unravel_index(ends.argmin(), ends.shape))
    steps = [j]
    for came_from in reversed(trail):
        steps.append(i)
        i, j = int(came_from[i, j]), i
    return steps[::-1]


def fitted_weights(
    products: Costs,
    branch: int,
    sources: Sequence[int],
    pair: tuple[int, int],
    steps: Sequence[int],
) -> NDArray[np.float64]:
    """Weights (steps, 2·sources + 1) of residuals and of the latent at hand, by least squares.

    The residual of `branch` at each of `steps` is approached by those of the branches `sources` at
    the older and the newer step of `pair`, in this order source by source, and by its own latent;
    when both are one step, the older's weight is 0. `products` (B + 1, N, B + 1, N): inner products
    of all residuals of B branches at N steps, then of the latents, of one run or summed over
    several.
    """
    count = products.shape[1]
    flat = products.reshape(len(products) * count, -1)
    older, newer = pair
    first = [source * count + step for source in sources for step in (older, newer)]
    newest = [*range(1, len(first), 2), len(first)]
    used = newest if older == newer else [*range(len(first) + 1)]
    known = np.array([[*first, flat.shape[1] - count + step] for step in steps])[:, used]
    inner = flat[known[:, :, None], known[:, None, :]]
    size = np.sqrt(np.maximum(np.diagonal(inner, axis1=1, axis2=2), 1e-300))
    scaled = inner / (size[:, :, None] * size[:, None, :]) + _RIDGE * np.eye(len(used))
    wanted = flat[known, branch * count + np.array(steps)[:, None]] / size
    weights = np.zeros((len(known), len(first) + 1))
    weights[:, used] = np.linalg.solve(scaled, wanted[:, :, None])[:, :, 0] / size
    return weights


def drift_costs(products: Costs, branch: int, sources: Sequence[int], strides: Costs) -> Costs:
    """Squared drift of the latent over a gap that is forecast with `fitted_weights`.

    Entry [i, j, n] (N, N, N + 1) is ‖Σ strideₛ·errorₛ‖² over the steps s between j and n: how far
    the solver ends up from where it would be, errors of one sign adding up. i = j only at step 0.
    """
    count = len(strides)
    flat = products.reshape(len(products) * count, -1)
    costs = np.zeros((count, count, count + 1))
    for newer in range(count - 1):
        after = np.arange(newer + 1, count)
        rows = np.arange(len(after))
        for older in range(newer) if newer else (0,):
            weights = fitted_weights(products, branch, sources, (older, newer), after.tolist())
            error = np.zeros((len(after), len(flat)))
            error[rows, branch * count + after] = 1
            for number, source in enumerate(sources):
                error[:, source * count + older] -= weights[:, 2 * number]
                error[:, source * count + newer] -= weights[:, 2 * number + 1]
            error[rows, len(flat) - count + after] = -weights[:, -1]
            drift = np.cumsum(error * strides[after, None], axis=0)
            costs[older, newer, newer + 2 :] = ((drift @ flat) * drift).sum(axis=1)
    return np.maximum(costs, 0.0)


def solver_strides(log_snr: Sequence[float], prediction: str) -> list[float]:
    """How far each step moves the latent for a unit of the denoiser's prediction.

    `log_snr`: log(signal/noise) a step; `prediction` as `StepClock.prediction`. The change of σ for
    flow matching; of noise/signal for "epsilon", in whose units a VP latent over its signal is an
    integral of ε; of the angle between both for "v_prediction"; for "sample" that over its sine.
    """
    ratio = np.exp(-np.asarray(log_snr, dtype=np.float64))
    angle = np.arctan(ratio)
    path = {"flow": ratio / (1 + ratio), "epsilon": ratio}.get(prediction, angle)
    strides = np.abs(np.diff(np.append(path, 0.0)))
    for step in np.flatnonzero(strides[1:] == 0) + 1:  # Heun's second look at a level: both count
        strides[step - 1 : step + 1] = strides[step - 1] / 2
    if prediction == "sample":
        strides = strides / np.sin(angle)
    found: list[float] = strides.tolist()
    return found
