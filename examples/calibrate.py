"""Let a search choose the methods and prove their quality: python examples/calibrate.py out/"""

import sys
from pathlib import Path

import accel
from accel import model_zoo
from accel.calibrate_result import UnreachableError

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
output.mkdir(parents=True, exist_ok=True)
pipe, call, _ = model_zoo.load("emoji-video")
call["num_inference_steps"] = 12
prompts = model_zoo.prompts("emoji-video", "heldout").read_text(encoding="utf-8").splitlines()

# One prompt gives a first recipe in three runs; eight give a front that other prompts confirmed.
try:
    found = accel.calibrate(pipe, prompts[:1], psnr=25, call=call, folder=output / "runs")
except UnreachableError as error:
    print(error)
    found = error.calibration  # the best there is
found.save(output / "accel_recipe.json")
for choice in found.front:
    names = " + ".join(entry.name for entry in choice.entries)
    print(f"{names}: {choice.speedup:.2f}×, {choice.psnr:.1f} dB")

accel.patch(pipe, recipe=output / "accel_recipe.json")
pipe(prompts[1], **call)
print(accel.stats(pipe))
