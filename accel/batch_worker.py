"""The worker of a batch: one loaded, patched pipeline that makes the files of one folder.

Every way to run a batch (this process, several devices through accelerate, several machines through
Ray) calls `Worker.do` and nothing else, so that all make the same files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import accel
from accel import generate, media
from accel.batch_checks import (
    LADDER,
    digest,
    fault,
    free,
    is_out_of_memory,
    model_revision,
)
from accel.batch_items import Item
from accel.batch_manifest import PRIVATE, Manifest, claim, sha256
from accel.batch_plan import Plan
from accel.loading import Loading
from accel.method import AccelError
from accel.recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """One result, the items that were made in one call with it, and what went wrong on the way."""

    array: NDArray[np.float32]
    seconds: float
    together: tuple[Item, ...]
    recipe: Recipe | None
    share_computed: float
    used: tuple[str, ...]
    check: str | None = None


class Worker:
    """Makes items. The pipeline is loaded once; `name` tells workers apart in the manifest."""

    def __init__(self, plan: Plan, name: str = "", device: str | None = None) -> None:
        assert plan.first is not None  # a plan that is carried out has an item
        self.plan, self.folder, self._first = plan, Path(plan.output), plan.first
        self.name = name or f"{socket.gethostname()}:{os.getpid()}"
        options = plan.job.loading
        if device is not None and options.device == "auto":
            options = dataclasses.replace(options, device=device)
        self.pipe, self.call, self.fps = generate.load(
            dataclasses.replace(plan.job, loading=options, prompt=self._first.prompt)
        )
        self.revision = model_revision(plan.job.model, self.pipe, options.revision)
        self.lightened: list[str] = []
        """What the out-of-memory ladder has changed for good."""
        self._rungs = list(LADDER)
        self._damaged: set[str] = set()
        """Names of files that are ours by the manifest but not as they were written."""
        self.recipe = self._settled()
        self.recipe_json = self.recipe.model_dump(mode="json")

    def _settled(self) -> Recipe:
        """The recipe with its tables, measured once for the folder, by whoever is first."""
        chosen = Recipe.read(self.plan.recipe) if self.plan.recipe else None
        key = digest(self.plan.recipe, self.revision, self.call | {"prompt": ""})
        file = self.folder / PRIVATE / f"recipe-{key}.json"
        while True:
            with claim(self.folder, f"recipe-{key}") as mine:
                if file.is_file():
                    return Recipe.load(file)
                if mine:
                    recipe = generate.settle(self.pipe, chosen, self._measure)
                    recipe.save(file)
                    return recipe
            time.sleep(0.2)

    def _measure(self) -> None:
        generate.render(self.pipe, self._call((self._first,)), [self._first.seed])

    def job_id(self, item: Item) -> str:
        """The same for the same item, model revision, recipe and version; batch size and place do
        not count."""
        call = {key: value for key, value in self._call((item,)).items() if key != "prompt"}
        settings = (self.plan.job.video_format, self.fps, _loading(self.plan.job.loading))
        about = (item.prompt, item.seed, call, self.revision, self.recipe_json, settings)
        return digest(*about, accel.__version__)

    def waiting(self, batch: tuple[Item, ...], manifest: Manifest) -> list[Item]:
        """The items of a batch that this run still has to make."""
        return [item for item in batch if self._is_waiting(item, manifest)]

    def _is_waiting(self, item: Item, manifest: Manifest) -> bool:
        assert item.name is not None  # items of a plan are named
        row = manifest.by_name.get(item.name)
        if row is not None and row.get("run") == self.plan.run:
            return False
        if item.error is not None or self.plan.overwrite:
            return True
        try:
            job = self.job_id(item)
        except AccelError:
            return True  # the error is reported where the item is made
        if manifest.done(item.name, job):
            return False
        if row is not None and row.get("id") == job:
            self._damaged.add(item.name)
        return True

    def do(self, batch: tuple[Item, ...], wanted: list[Item]) -> Iterator[dict[str, Any]]:
        """Make the `wanted` items of a batch; a row for each, errors included.

        The whole batch runs even if a part of it is wanted, because what runs together changes the
        last bits, and with adaptive methods the decisions. Raises `OSError` when the disk is full.
        """
        good = tuple(item for item in batch if item.error is None and self._problem(item) is None)
        for item in wanted:
            if item not in good:
                yield self.failed(item, item.error or self._problem(item) or "")
        asked = [item for item in good if item in wanted]
        kept = {item.index: self._existing(item) for item in asked}
        for item in asked:
            if kept[item.index] is not None:
                yield self._row(item, **kept[item.index] or {})
        asked = [item for item in asked if kept[item.index] is None]
        if not asked:
            return
        made, error = self._persistently(good)
        for item in asked:
            if made is None:
                yield self.failed(item, error)
            else:
                yield self._written(item, made[item.index])

    # --- before ----------------------------------------------------------------------------------

    def _problem(self, item: Item) -> str | None:
        try:
            self._call((item,))
        except AccelError as error:
            return f"line {item.line}: {error}"
        return None

    def _existing(self, item: Item) -> dict[str, Any] | None:
        """What to say of a file that lies there already: adopted, refused, or None to make it."""
        if self.plan.overwrite or item.name in self._damaged:
            return None
        found = [path for path in self._candidates(item) if path.is_file()]
        if not found:
            return None
        try:
            about = media.read_metadata(found[0])
        except (AccelError, ValueError):
            about = {}
        if about.get("id") == self.job_id(item):
            return self._file(item, found[0]) | {"seconds": None}
        return {
            "status": "failed",
            "error": f"{found[0].name} lies there and was made with other settings, or is damaged; "
            "--overwrite replaces it, or use another --output",
        }

    def _candidates(self, item: Item) -> list[Path]:
        suffixes = dict.fromkeys((self.plan.job.video_format, "png"))
        return [self.folder / f"{item.name}.{suffix}" for suffix in suffixes]

    # --- making ----------------------------------------------------------------------------------

    def _call(self, items: tuple[Item, ...]) -> dict[str, Any]:
        """The arguments of one call for items that share theirs."""
        call = generate.completed(self.pipe, self.call, items[0].call)
        prompts = [item.prompt for item in items]
        default = call.get("negative_prompt")
        negatives = [
            default if item.negative_prompt is None else item.negative_prompt for item in items
        ]
        single = len(items) == 1
        if any(negative is not None for negative in negatives):
            filled = [negative or "" for negative in negatives]
            call = generate.completed(
                self.pipe, call, {"negative_prompt": filled[0] if single else filled}
            )
        return call | {"prompt": prompts[0] if single else prompts}

    def _persistently(self, items: tuple[Item, ...]) -> tuple[dict[int, Made] | None, str]:
        """Results by index, after at most `retry` more tries; or None and the last error."""
        error = ""
        for attempt in range(self.plan.retry + 1):
            try:
                return self._lightened(items), ""
            except Exception as problem:  # an item may fail in any way; its row says how
                error = f"{type(problem).__name__}: {problem}".splitlines()[0]
                logger.warning("try %d of items %s: %s", attempt + 1, _numbers(items), error)
                free()
        return None, error

    def _lightened(self, items: tuple[Item, ...]) -> dict[int, Made]:
        """Results by index; with `oom_fallback`, by smaller batches, VAE tiling and offloading."""
        while True:
            try:
                return self._checked(items)
            except Exception as error:
                if not (self.plan.oom_fallback and is_out_of_memory(error)):
                    raise
            free()
            if len(items) > 1:
                half = len(items) // 2
                logger.warning("out of memory: items %s in two parts", _numbers(items))
                return self._lightened(items[:half]) | self._lightened(items[half:])
            self._give_up_speed()

    def _give_up_speed(self) -> None:
        """Take the next rung of the ladder that does anything here."""
        while self._rungs:
            rung = self._rungs.pop(0)
            if LADDER[rung](self.pipe):
                self.lightened.append(rung)
                logger.warning("out of memory: going on with %s", rung)
                return
        taken = ", ".join(self.lightened) or "nothing left to give up"
        raise AccelError(f"out of memory even with batch size 1 and {taken}")

    def _checked(self, items: tuple[Item, ...]) -> dict[int, Made]:
        """Results by index; those that are not finite or all black are made again untouched."""
        made = self._run(items, self.recipe)
        faults = {index: fault(each.array) for index, each in made.items()}
        if not any(faults.values()):
            return made
        what = next(each for each in faults.values() if each)
        logger.warning("items %s: %s, once more without acceleration", _numbers(items), what)
        plain = self._run(items, None)
        for index, found in faults.items():
            if found is None:
                continue
            if fault(plain[index].array) == "not finite":
                raise AccelError("values that are not finite, without acceleration too")
            note = f"{found}; made again without acceleration"
            made[index] = dataclasses.replace(plain[index], check=note)
        return made

    def _run(self, items: tuple[Item, ...], recipe: Recipe | None) -> dict[int, Made]:
        call, seeds = self._call(items), [item.seed for item in items]
        with contextlib.ExitStack() as stack:
            patch = None
            if recipe is not None:
                patch = stack.enter_context(accel.patched(self.pipe, recipe=recipe))
            arrays, seconds = generate.render(self.pipe, call, seeds)
            report = patch.report() if patch else None
        share, used = (report.share_computed, report.methods) if report else (1.0, ())
        return {
            item.index: Made(array, seconds / len(items), items, recipe, share, used)
            for item, array in zip(items, arrays, strict=True)
        }

    # --- after -----------------------------------------------------------------------------------

    def _written(self, item: Item, made: Made) -> dict[str, Any]:
        assert item.name is not None  # items of a plan are named
        try:
            path = media.save(
                self.folder / item.name,
                generate.pixels(made.array),
                self.fps,
                self.plan.job.video_format,
                self._metadata(item, made),
            )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            return self.failed(item, f"{type(error).__name__}: {error}")
        row = self._file(item, path) | {
            "seconds": made.seconds,
            "share_computed": made.share_computed,
        }
        notes = {"check": made.check, "fallback": list(self.lightened) or None}
        return self._row(item, **row, **{key: note for key, note in notes.items() if note})

    def _metadata(self, item: Item, made: Made) -> dict[str, Any]:
        call = self._call((item,))
        job = dataclasses.replace(self.plan.job, prompt=item.prompt, seed=item.seed)
        about = generate.metadata(job, call, made.recipe, self.fps, made.used)
        about |= {"id": self.job_id(item), "model_revision": self.revision}
        if len(made.together) > 1:
            about["batch"] = [
                {
                    "prompt": each.prompt,
                    "seed": each.seed,
                    "negative_prompt": self._call((each,)).get("negative_prompt"),
                }
                for each in made.together
            ]
            about["place"] = made.together.index(item)
        if self.lightened:
            about["fallback"] = list(self.lightened)
        return about if made.check is None else about | {"check": made.check}

    def failed(self, item: Item, error: str) -> dict[str, Any]:
        """The row of an item that was not made."""
        return self._row(item, status="failed", error=error)

    def _file(self, item: Item, path: Path) -> dict[str, Any]:
        return {
            "status": "done",
            "id": self.job_id(item),
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }

    def _row(self, item: Item, **more: Any) -> dict[str, Any]:
        row = {"index": item.index, "name": item.name, "seed": item.seed, "prompt": item.prompt}
        measured = {"run": self.plan.run, "worker": self.name, "finished": time.time()}
        return row | more | measured


def _loading(options: Loading) -> dict[str, Any]:
    """What of the loading changes results; devices are not a part of what was asked for."""
    return {key: value for key, value in dataclasses.asdict(options).items() if key != "device"}


def _numbers(items: tuple[Item, ...]) -> str:
    return ", ".join(str(item.index) for item in items)
