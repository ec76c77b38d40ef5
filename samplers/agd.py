"""AGD: adapters make one branch predict what guidance makes of two."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel import adapter_files, trained_folder
from accel.adapters import Adapters
from accel.denoiser import Denoiser
from accel.guidance import GuidanceContext, guide
from accel.low_rank import LowRank
from accel.method import AccelError, Handle, check

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

TRAIN = (
    "train AGD's adapters with `accel adapters train -m MODEL --prompts FILE -o FOLDER` and give "
    "AGD(adapters=FOLDER)"
)


@dataclass(frozen=True)
class AGD:
    """Run the conditional branch alone, with adapters that know the guidance scale.

    Perez Jensen and Sadat, "Adapter Guidance Distillation", TMLR 2025. `adapters` is a folder that
    `accel adapters train` wrote; None is `adapters/agd` beside the model's weights, which the zoo's
    emoji-image and emoji-unet have. The pipeline's own guidance scale goes to the adapters at each
    run, so scales keep their meaning; what they return stands for both branches, so the pipeline's
    arithmetic leaves it alone. Negative prompts do not act: the one of the training is baked in.
    Raises `AccelError` for adapters of another base and for models that take the scale as an input.

    Differs from the paper: by default the adapters are low-rank offsets of all weights, which lie
    in the weights while a run lasts (`accel.low_rank`) and cost nothing at a call. The paper's
    networks beside attention layers are there too (`accel.adapters`).
    Static: rows of a batch are independent. Holds the adapters' weights, and during a run a copy of
    the weights that they change.
    """

    slot: ClassVar[str] = "guidance"
    folders: ClassVar[tuple[str, ...]] = ("adapters",)
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    adapters: str | None = None

    def __post_init__(self) -> None:
        accepted = self.adapters is None or isinstance(self.adapters, str)
        check(accepted, self, "adapters", "None or the path of a folder")

    def attach(self, denoiser: Denoiser) -> Handle:
        """Attach the adapters to the denoiser, and to its guidance branches."""
        if denoiser.name == "transformer_2":
            raise AccelError("AGD adapters are for one denoiser; this pipeline has two")
        folder = trained_folder.find(self.adapters, denoiser.module, "agd", TRAIN)
        adapters = adapter_files.load(folder).to(denoiser.module.device)
        branches = guide(denoiser, lambda: _OneBranch(denoiser, adapters), "AGD")
        try:
            serving = adapters.serve(denoiser)
        except BaseException:
            branches.remove()
            raise
        return Handle.together([branches, serving])


class _OneBranch:
    def __init__(self, denoiser: Denoiser, adapters: Adapters | LowRank) -> None:
        self.adapters, call = adapters, denoiser.clock.call
        scale = float(call.get("true_cfg_scale") or call.get("guidance_scale") or 1.0)
        low, high = adapters.config.scales
        if not low <= scale <= high and call:
            logger.warning("AGD: trained for scales %g to %g; %g extrapolates", low, high, scale)
        adapters.begin(scale)

    def begin(self, context: GuidanceContext) -> str:
        return "cond"

    def full(self, context: GuidanceContext, cond: Tensor, uncond: Tensor) -> Tensor:
        return uncond  # never asked: no step is full

    def substitute(self, context: GuidanceContext, cond: Tensor) -> Tensor:
        return cond
