"""A method that measures the model once, kept as a recipe: python examples/patch_video.py out/"""

import sys
from pathlib import Path

import torch

import accel
from accel import media, model_zoo

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
output.mkdir(parents=True, exist_ok=True)
pipe, call, fps = model_zoo.load("emoji-video")
call["num_inference_steps"] = 20


def film(prompt: str) -> None:
    noise = torch.Generator().manual_seed(0)
    frames = pipe(prompt, **call, generator=noise, output_type="np").frames[0]
    pixels = (frames * 255).round().astype("uint8")
    name = prompt.replace(" ", "_") + ".mp4"
    print("wrote", media.save_video(output / name, pixels, fps, {"prompt": prompt}))


with accel.patched(pipe, accel.MagCache()) as patch:
    film("rocket on a blue background sliding up")  # computed in full: the model is measured
    film("apple on a red background sliding down")  # reuses
    print(patch.report())
    patch.recipe().save(output / "magcache.json")

with accel.patched(pipe, recipe=output / "magcache.json") as patch:  # later: no measuring run
    film("star on a green background spinning")
    print(f"{patch.report().share_computed:.0%} of the blocks were computed")
