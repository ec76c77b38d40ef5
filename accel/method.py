"""The contract between a method, the denoiser it attaches to and the user who patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeGuard, cast, runtime_checkable

if TYPE_CHECKING:
    from accel.denoiser import Denoiser


class AccelError(ValueError):
    """A wrong argument, model, file or recipe; names what was wrong and what is accepted."""

    exit_code: ClassVar[int] = 2


class MissingError(AccelError):
    """A package, device or service that is needed is not here."""

    exit_code: ClassVar[int] = 3


class Handle:
    """What attaching returns: `remove()` undoes it once, and it works as a context manager."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo
        self.settled: Callable[[], Any] | None = None
        """The method with everything it measured by now, when it measures."""

    @classmethod
    def together(cls, handles: Sequence[Handle]) -> Handle:
        """One handle for several; the last attached is removed first."""

        def undo() -> None:
            for handle in reversed(handles):
                handle.remove()

        return cls(undo)

    def settling(self, settled: Callable[[], Any]) -> Handle:
        """This handle, knowing how to give the method with what it measured."""
        self.settled = settled
        return self

    def remove(self) -> None:
        """Undo; calling it again does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


@runtime_checkable
class Method(Protocol):
    """A published way to be faster: a frozen dataclass of settings that can attach itself.

    `slot` names what the method changes; two methods of one slot cannot share a pipeline.
    `trials` are the settings that benchmarks and calibration try, mild to strong. Optional: `files`
    and `folders`, settings that name such; see `accel.recipe_tensors`.
    """

    slot: ClassVar[str]
    trials: ClassVar[tuple[dict[str, Any], ...]]

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach to one denoiser; raise `AccelError` when the method does not apply to it."""
        ...


def check(condition: bool, owner: object, field: str, accepted: str) -> None:
    """Raise `AccelError` naming the class, the value and what is accepted, unless `condition`."""
    if not condition:
        raise AccelError(
            f"{type(owner).__name__}({field}={getattr(owner, field)!r}): {field} must be {accepted}"
        )


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number (not a bool)."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < float("inf")  # False for NaN too
    )


def is_series(value: object, entry: Callable[[Any], bool], least: int = 1) -> bool:
    """Whether `value` is a list or tuple of at least `least` entries that each pass `entry`."""
    return isinstance(value, list | tuple) and len(value) >= least and all(map(entry, value))


def is_schedule(value: object) -> TypeGuard[Sequence[int]]:
    """Whether `value` holds ones (compute) and zeros (reuse), one for each step, first a one."""
    return is_series(value, lambda each: each in (0, 1)) and cast("Sequence[int]", value)[0] == 1


def is_count(value: object, least: int) -> bool:
    """Whether `value` is an int of at least `least` (not a bool)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
