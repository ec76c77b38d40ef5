"""Shared fixtures: tiny pipelines built once, and the contract matrix printed at the end."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from tiny_pipelines import MATRIX, TINY, built

import accel


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny(request: pytest.FixtureRequest):
    """The session's pipeline of the family named by the parameter, unpatched afterwards."""
    found, _ = built(request.param)
    yield found
    accel.unpatch(found.pipe)


@pytest.fixture
def baseline():
    """`baseline(name)` → untouched latents."""
    return lambda name: built(name)[1]


def pytest_terminal_summary(terminalreporter) -> None:
    if not MATRIX:
        return
    methods = sorted({method for method, _ in MATRIX})
    terminalreporter.section("contract matrix: reused share, or why refused")
    for family in TINY:
        cells = [f"{method} {MATRIX.get((method, family), '-')}" for method in methods]
        terminalreporter.write_line(f"{family:<14} " + "  ".join(cells))
