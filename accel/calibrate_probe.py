"""Other ways to make a denoiser's call: timed and compared with the plain one during a recording.

Attention kernels and quantised linear layers change what every computed call costs and how exact it
is; staged samplers make some calls at another size. Neither can be told from recorded outputs, so a
few calls of the recorded run are made once more in those ways.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from accel import registry
from accel.method import AccelError, Handle, Method
from accel.model_calls import predictions
from accel.recipe import Recipe
from accel.site import Branch
from accel.stages import Stage
from accel.staging import StagedRun

if TYPE_CHECKING:
    from torch import Tensor

    from accel.denoiser import Denoiser

PLACES = (0.25, 0.75)
"""Of the schedule: where calls are made again."""
SCALES = (0.5,)
"""Of rows and columns: the sizes that calls are timed at."""
SHARES = (0.5, 0.3)
"""Of the key blocks: what block-sparse attention that can be fitted is fitted to keep."""
BRANCH = Branch("probe", 0)
_REPEATS = 2

Probe = tuple[float, float]
"""(seconds over those of the plain call, relative L2 distance of the predictions)."""


def variants() -> list[Method]:
    """The kernels that `accel.calibrate` probes; where one cannot run, the plain one does."""
    attention, linear = registry.method("attention"), registry.method("linear")
    kernels = ("auto", "sage_int8", "sage_int8_fp8", "adaptive")
    several: list[Method] = [attention(kernel=name) for name in kernels]
    several += [registry.method(name)() for name in ("nabla", "spargeattention")]
    return [*several, *(linear(format=name) for name in ("w8a8", "fp8"))]


def key(method: Method) -> str:
    """A method as JSON: what probes are known by."""
    return json.dumps(Recipe.of((method,)).entries[0].model_dump())


def size_key(scale: float) -> str:
    """The same for calls at another size."""
    return f"size {scale:g}"


def probe(
    denoiser: Denoiser,
    run: Callable[[Branch, Any, Any], Any],
    args: Any,
    kwargs: Any,
    methods: Sequence[Method],
) -> dict[str, Probe]:
    """Make a call plainly, with each of `methods`, and at each of `SCALES`.

    `run(branch, args, kwargs)` calls the denoiser. Methods and sizes that the model does not take
    are left out. The denoiser is as before afterwards.
    """
    call = partial(run, BRANCH)
    plain = partial(call, args, kwargs)
    seconds, expected = _timed(plain)
    found: dict[str, Probe] = {}

    def compare(name: str, own: float, output: Tensor) -> None:
        nonlocal seconds
        if own < seconds:  # or was the machine busier before?
            seconds = _timed(plain)[0]
        found[name] = (own / seconds, float((output - expected).norm() / expected.norm()))

    for method in methods:
        with contextlib.suppress(AccelError):
            with removed(method.attach(denoiser)):
                own = _timed(plain)
            compare(key(method), *own)
    for scale in SCALES:
        with contextlib.suppress(AccelError):
            own = _timed(partial(_resized, denoiser, call, args, kwargs, scale))
            compare(size_key(scale), *own)
    return found


def block_maps(
    denoiser: Denoiser, call: Callable[[], Any], methods: Sequence[Method]
) -> dict[str, Tensor]:
    """Block-wise attention of a call by layer, as the first of `methods` that looks at it does."""
    maps: dict[str, Tensor] = {}
    for method in methods:
        watch = getattr(method, "watch", None)
        if watch is not None and not maps:
            with contextlib.suppress(AccelError), removed(watch(denoiser, maps)):
                call()
    return maps


def fitted(methods: Sequence[Method], maps: Sequence[Tensor]) -> tuple[Method, ...]:
    """`methods`, those that look at block maps once for each of `SHARES`, if there are maps."""
    found: list[Method] = []
    for method in methods:
        fit = getattr(method, "fitted", None) if hasattr(method, "watch") and maps else None
        found += [method] if fit is None else [fit(maps, share) for share in SHARES]
    return tuple(found)


@contextlib.contextmanager
def removed(handle: Handle) -> Iterator[None]:
    """Something attached, for a while."""
    try:
        yield
    finally:
        handle.remove()


def _resized(
    denoiser: Denoiser, call: Callable[[Any, Any], Any], args: Any, kwargs: Any, scale: float
) -> Any:
    """The call with every second row and column, its prediction repeated to full size."""
    method: Any = registry.method("progressive")(scales=(scale, 1.0))
    if denoiser.family.resized is None:
        raise AccelError("a denoiser whose other sizes are not known")
    return StagedRun(method, "accel.profile", stages=[Stage((1.0, 0.0), scale)]).call(
        denoiser, call, args, kwargs
    )


def _timed(call: Callable[[], Any]) -> tuple[float, Tensor]:
    """Seconds of the faster of two calls, and the prediction in fp32."""
    best = float("inf")
    began = time.perf_counter()
    for _ in range(_REPEATS):
        output = predictions(call())[0]
        ended = now(output)
        best, began = min(best, ended - began), ended
    return best, output.float()


def now(like: Any) -> float:
    """Host time once the device of `like` has done its work."""
    if isinstance(like, torch.Tensor) and like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
