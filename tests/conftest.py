"""Shared fixtures: tiny pipelines built once, and the contract matrix printed at the end."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from tiny_pipelines import MATRIX, TINY, built, left_behind

import accel


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _shared_pipelines_stay_clean():
    """A hook left behind would act, and grow, in every later test of the session."""
    yield
    assert not left_behind()


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


@pytest.fixture
def video(tmp_path):
    """An MP4 of six grey frames of 48 × 32, each brighter than the one before."""
    av, np = pytest.importorskip("av"), pytest.importorskip("numpy")
    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 48, 32
        for number in range(6):
            picture = np.full((32, 48, 3), 40 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file


def pytest_sessionfinish(session) -> None:
    """A worker of pytest-xdist hands its cells of the matrix over."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["matrix"] = [[*place, cell] for place, cell in MATRIX.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    cells = getattr(node, "workeroutput", {}).get("matrix", ())
    MATRIX.update({(method, family): cell for method, family, cell in cells})


def pytest_terminal_summary(terminalreporter) -> None:
    if not MATRIX:
        return
    methods = sorted({method for method, _ in MATRIX})
    terminalreporter.section("contract matrix: reused share, or why refused")
    for family in TINY:
        cells = [f"{method} {MATRIX.get((method, family), '-')}" for method in methods]
        terminalreporter.write_line(f"{family:<14} " + "  ".join(cells))
