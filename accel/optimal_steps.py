"""Which steps to compute when the others are forecast from them: dynamic programming over pairs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]


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
    """The `computes` steps, 0 among them, from which the others are forecast best."""
    count = len(costs)
    join = np.maximum if minimax else np.add
    gather = np.maximum.accumulate(costs, axis=2) if minimax else np.cumsum(costs, axis=2)
    until = np.concatenate((np.zeros((count, count, 1)), gather), axis=2)  # errors before step n
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
