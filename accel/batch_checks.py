"""What a batch looks at before it trusts a result, a file or a model."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLACK = 1 / 255
"""A result without any value above this is taken for a failure of the numbers."""


def fault(array: NDArray[np.float32]) -> str | None:
    """What is wrong with a result: "not finite", "all black" or nothing."""
    if not np.isfinite(array).all():
        return "not finite"
    return "all black" if array.max() <= BLACK else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in said for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def model_revision(model: str, pipe: Any, revision: str | None = None) -> str:
    """The commit of a repository; of a folder, a digest of its files' names, sizes and ends."""
    origin = pipe.config.get("_name_or_path") or model
    folder = Path(str(origin))
    if folder.is_dir():
        if folder.parent.name == "snapshots":
            return folder.name
        return digest([_outline(folder, path) for path in sorted(folder.rglob("*"))])
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else "unknown"


def _outline(folder: Path, path: Path, ends: int = 65_536) -> tuple[str, int, str] | None:
    """A file's place, size, and a digest of its first and last bytes: weights are large."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    with path.open("rb") as file:
        content = file.read(ends)
        file.seek(max(size - ends, 0))
        content += file.read(ends)
    return str(path.relative_to(folder)), size, hashlib.sha256(content).hexdigest()


def _tile(pipe: Any) -> bool:
    able = hasattr(getattr(pipe, "vae", None), "enable_tiling")
    if able:
        pipe.vae.enable_tiling()
    return able


def _offload(pipe: Any) -> bool:
    able = bool(pipe.device.type != "cpu")
    if able:
        pipe.enable_model_cpu_offload(device=pipe.device)
    return able


LADDER: dict[str, Callable[[Any], bool]] = {"vae-tiling": _tile, "offload": _offload}
"""What is given up, one after the other, when one item alone does not fit; whether it could be."""


def free() -> None:
    """Give memory back before another try."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def digest(*values: Any) -> str:
    """Sixteen hex digits of JSON values."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
