"""A prompt file to pictures, resumable, from Python: python examples/batch.py out/"""

import sys
from pathlib import Path

from accel import batch, batch_items, generate, model_zoo
from accel.batch_plan import Plan

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out").absolute()
prompts = str(model_zoo.prompts("emoji-unet", "final"))
items = batch_items.named(batch_items.read(prompts, seeds=(0, 1))[:6])
plan = Plan(
    job=generate.Job(model="zoo:emoji-unet", prompt="", steps=10),
    output=str(output),
    first=items[0],
    batches=batch.batches(items, size=2),
)
summary = batch.run(plan, emit=lambda row: print(row["status"], row.get("file", row.get("error"))))
print(f"{summary['made']} made, {summary['kept']} kept from before, {summary['failed']} failed")
