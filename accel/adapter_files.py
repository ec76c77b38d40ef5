"""Files of AGD's adapters: safetensors weights and a JSON configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accel import trained_folder
from accel.adapters import AdapterConfig, Adapters
from accel.low_rank import LowRank, LowRankConfig

NAME = "adapters"
"""Of the two files in a folder of adapters."""
VARIANTS = ("low_rank", "cross", "offset")


def save(adapters: Adapters | LowRank, folder: Path, notes: dict[str, Any]) -> None:
    """Write weights in half precision and the configuration, with `notes` on the training."""
    trained_folder.save(adapters, adapters.config, folder, NAME, notes)


def load(folder: Path) -> Adapters | LowRank:
    """Adapters that `save` wrote, in fp32; raises `AccelError` for any other folder."""

    def build(content: dict[str, Any]) -> Adapters | LowRank:
        content = {**content, "scales": tuple(content["scales"])}
        if content["variant"] == "low_rank":
            return LowRank(LowRankConfig(**content))
        return Adapters(AdapterConfig(**content))

    return trained_folder.load(folder, NAME, build, "adapters", "`accel adapters train`")
