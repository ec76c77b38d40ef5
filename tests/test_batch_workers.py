"""Several processes, Ray actors and ranks that share a sequence: the same files, even killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_pipelines import TINY

ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
COUNT = 8


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model, a prompt file, and the files of a plain run."""
    folder = tmp_path_factory.mktemp("workers")
    TINY["sd15"]().pipe.save_pretrained(folder / "model")
    (folder / "p.txt").write_text("".join(f"a cat {n}\n" for n in range(COUNT)))
    batch(folder, folder / "plain")
    return folder


def command(folder: Path, output: Path, *more: str) -> list[str]:
    call = json.dumps({"height": 16, "width": 16})
    return [
        *(sys.executable, "-m", "accel", "batch", str(folder / "p.txt")),
        *("-m", str(folder / "model"), "-o", str(output), "--steps", "6"),
        *("--method", "easycache", "--pipeline-kwargs", call, "--format", "json", *more),
    ]


def batch(folder: Path, output: Path, *more: str) -> list[dict]:
    done = subprocess.run(
        command(folder, output, *more), env=ENV, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.png")}


def rows(folder: Path) -> list[dict]:
    path = folder / "manifest.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda row: row["index"])


def lasting(folder: Path) -> list[dict]:
    """What of the rows does not differ from run to run."""
    measured = {"seconds", "worker", "finished", "run"}
    return [{k: v for k, v in row.items() if k not in measured} for row in rows(folder)]


@pytest.mark.slow
def test_two_processes_of_accelerate_write_the_same_manifest(setting, tmp_path) -> None:
    *printed, summary = batch(setting, tmp_path, "--workers", "2")
    assert summary["made"] == COUNT
    assert len(printed) == COUNT
    assert files(tmp_path) == files(setting / "plain")
    assert lasting(tmp_path) == lasting(setting / "plain")


def kill_one_worker(folder: Path, pids) -> None:
    """kill -9 a worker once the second row is there."""
    while len(rows(folder)) < 2:
        time.sleep(0.02)
    os.kill(pids()[0], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_two_actors_of_ray_write_the_same_manifest(setting, tmp_path, kill) -> None:
    pytest.importorskip("ray")
    killed: list[int] = []

    def worker_pids() -> list[int]:
        killed.append(int(rows(tmp_path)[0]["worker"].rsplit(":", 1)[1]))
        return killed

    if kill:
        threading.Thread(target=kill_one_worker, args=(tmp_path, worker_pids), daemon=True).start()
    summary = batch(setting, tmp_path, "--ray", "local", "--workers", "2")[-1]
    assert (summary["made"], summary["failed"]) == (COUNT, 0)
    assert files(tmp_path) == files(setting / "plain")
    assert lasting(tmp_path) == lasting(setting / "plain")
    assert bool(killed) == kill


def test_ray_without_ray_or_cluster_is_exit_3(setting, tmp_path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from accel.cli import main; sys.argv[0] = 'accel'; main()"
    )
    line = command(setting, tmp_path, "--ray", "local")
    done = subprocess.run(
        [sys.executable, "-c", code, *line[3:]], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("accel: --ray needs Ray: pip install")


def test_interrupted_by_sigterm_is_exit_130_and_can_go_on(setting, tmp_path) -> None:
    running = subprocess.Popen(
        command(setting, tmp_path, "--steps", "40"),
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not rows(tmp_path):
        time.sleep(0.02)
    running.terminate()
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "the same command goes on where it stopped" in said
    assert not list(tmp_path.glob(".*.part"))
    assert len(rows(tmp_path)) < COUNT


@pytest.mark.slow
def test_ranks_that_share_a_sequence_agree_on_every_decision() -> None:
    """2 gloo ranks under torchrun; see `context_parallel_ranks.py` for what each of them checks."""
    script = Path(__file__).parent / "context_parallel_ranks.py"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script)),
        ],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agreed") == 2
