"""A cache, a guidance policy and attention kernels together: python examples/combine.py"""

import torch

import accel
from accel import metrics, model_zoo

pipe, call, _ = model_zoo.load("emoji-video")
call |= {"num_inference_steps": 16, "output_type": "pt"}
cache = accel.PlainCycle(interval=3, warmup=3, reuse=accel.Taylor(order=1))
guidance = accel.CfgCache()
COMBINATIONS = {
    "cache": (cache,),
    "guidance": (guidance,),
    "cache + guidance": (cache, guidance),
    "cache + guidance + kernels": (cache, guidance, accel.Attention()),
}


def film() -> torch.Tensor:
    """(1, frames, 3, height, width) in [0, 1]."""
    noise = torch.Generator().manual_seed(0)
    return pipe("rocket on a blue background sliding up", **call, generator=noise).frames


untouched = film()
for name, methods in COMBINATIONS.items():
    with accel.patched(pipe, *methods) as patch:
        made = film()
        share = patch.report().share_computed
    print(f"{name}: {share:.0%} computed, PSNR {metrics.psnr(made, untouched):.1f} dB")
try:
    accel.patch(pipe, cache, accel.MagCache())
except accel.AccelError as error:  # two of one kind are refused, and nothing was changed
    print("refused:", error)
