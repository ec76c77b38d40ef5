"""The order of tokens by tiles against a brute-force loop."""

from __future__ import annotations

import itertools

import pytest
import torch

from accel.kernels.token_tiles import sequence_orders, tile_order

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("grid", "tile"),
    [
        ((1, 8, 8), (1, 8, 8)),
        ((3, 16, 8), (1, 4, 4)),
        ((5, 7, 9), (2, 4, 4)),
        ((1, 1, 5), (1, 8, 8)),
    ],
)
def test_tokens_of_a_tile_are_neighbours(grid, tile) -> None:
    places = {
        place: index for index, place in enumerate(itertools.product(*(range(n) for n in grid)))
    }
    ordered = sorted(
        places,
        key=lambda place: (
            *(p // size for p, size in zip(place, tile, strict=True)),
            *(p % size for p, size in zip(place, tile, strict=True)),
        ),
    )
    assert tile_order(grid, tile).tolist() == [places[place] for place in ordered]


@pytest.mark.parametrize("start", [0, 2, 5])
def test_text_comes_last_and_the_inverse_undoes(start) -> None:
    order, inverse = sequence_orders((2, 4, 4), (1, 2, 2), start, 37, CPU)
    tokens = torch.arange(37)
    assert torch.equal(tokens[order][inverse], tokens)
    assert sorted(order.tolist()) == tokens.tolist()
    assert set(order[:32].tolist()) == set(range(start, start + 32))
