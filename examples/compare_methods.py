"""Speed against quality of some methods on your prompts: python examples/compare_methods.py out/"""

import sys
from pathlib import Path

from accel import bench, model_zoo

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
output.mkdir(parents=True, exist_ok=True)
plan = bench.Plan(
    model="zoo:emoji-unet",
    methods="spectrum",  # or all; every method brings settings to try
    prompts=model_zoo.prompts("emoji-unet", "heldout"),
    num_prompts=1,
    steps=20,
    repeats=1,
)
result = bench.run(plan, output / "bench.json", command="examples/compare_methods.py", say=print)
print(bench.table(result))
