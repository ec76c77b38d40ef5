"""The plan of a batch: what to make, ready to be sent to another process."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from accel import generate
from accel.batch_items import Item
from accel.loading import Loading


@dataclass(frozen=True)
class Plan:
    """What a batch makes. `job` holds the arguments of every item that does not set its own,
    `recipe` the methods asked for (none: the best known ones), `first` the item that tables are
    measured on (the same in all shards), `run` names this run in its rows."""

    job: generate.Job
    output: str
    recipe: dict[str, Any] = field(default_factory=dict)
    first: Item | None = None
    batches: tuple[tuple[Item, ...], ...] = ()
    overwrite: bool = False
    retry: int = 0
    on_error: str = "continue"
    oom_fallback: bool = False
    deadline: float | None = None
    prices: tuple[float, ...] = ()
    run: str = ""

    def to_json(self) -> str:
        """For another process; `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote."""
        content = json.loads(text)
        job = content["job"]
        job["loading"]["lora"] = tuple(job["loading"]["lora"])
        content["job"] = generate.Job(**job | {"loading": Loading(**job["loading"])})
        content["first"] = Item(**content["first"])
        content["batches"] = tuple(
            tuple(Item(**item) for item in batch) for batch in content["batches"]
        )
        return cls(**content | {"prices": tuple(content["prices"])})
