"""A batch on a Ray cluster: one actor a device, the same worker, the same manifest.

Every machine must see the output folder under the same path. Anyone who reaches Ray's ports can run
code there: use it on trusted networks only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from accel.batch import Emit, StoppedError
from accel.batch_manifest import Manifest
from accel.batch_plan import Plan
from accel.batch_worker import Worker
from accel.method import MissingError

CPU_SHARE = 0.5
"""CPUs that an actor without a GPU asks for: were it all of them, Ray could not read the items."""


class Actor:
    """Loads the model once; called with one batch after another."""

    def __init__(self, plan: str) -> None:
        self.plan = Plan.from_json(plan)
        self.worker = Worker(self.plan, f"{socket.gethostname()}:{os.getpid()}")
        self.manifest = Manifest(Path(self.plan.output))

    def __call__(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Make batch number `numbers["item"][0]`; its rows go to the manifest and to the driver.

        Errors of items are rows, not exceptions: one exception would end the whole job. A batch
        that a killed actor had begun is finished: what has a row of this run is left as it is.
        """

        batch = self.plan.batches[int(numbers["item"][0])]
        self.manifest.refresh()
        wanted = self.worker.waiting(batch, self.manifest)
        rows = []
        try:
            for row in self.worker.do(batch, wanted):
                self.manifest.append(row)
                rows.append(row)
        except OSError as error:  # the disk is full
            rows += [
                self.worker.failed(item, f"{type(error).__name__}: {error}")
                for item in wanted[len(rows) :]
            ]
        return {"rows": [json.dumps(rows)]}


def work(plan: Plan, address: str, actors: int, emit: Emit) -> None:
    """Make everything in the plan on a cluster; "local" starts one on this machine.

    Raises `MissingError` without Ray or without the cluster, `StoppedError` at the first failed
    item when the plan says so.
    """
    results = sys.stdout

    def tell(row: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(results):
            emit(row)

    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what its daemon says
        _work(plan, address, actors, tell)


def _work(plan: Plan, address: str, actors: int, emit: Emit) -> None:
    ray = _ray()
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=40)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MissingError(f"--ray {address}: {str(error).splitlines()[0]}") from error
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        needs = {"num_gpus": 1} if gpus else {"num_cpus": CPU_SHARE}
        ray.data.DataContext.get_current().enable_progress_bars = False
        numbers = list(range(len(plan.batches)))
        done = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
            Actor,
            fn_constructor_args=(plan.to_json(),),
            compute=ray.data.ActorPoolStrategy(size=actors),
            batch_size=1,
            **needs,
        )
        for result in done.iter_rows():
            for row in json.loads(result["rows"]):
                emit(row)
                if row["status"] == "failed" and plan.on_error == "stop":
                    raise StoppedError(row["error"])
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingError("--ray needs Ray: pip install 'diffusers-accel[ray]'") from error
    return ray
