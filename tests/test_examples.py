"""Every example runs on the zoo, and does what it says."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAID = {
    "batch": r"(.|\n)*6 made, 0 kept from before, 0 failed",
    "calibrate": r"(psnr=25 was not.*\n)?\w+.*: \d\.\d\d×, \d+\.\d dB\n(.|\n)*share computed +\d",
    "combine": r"(.|\n)*kernels: \d\d% computed(.|\n)*refused: PlainCycle and MagCache both change",
    "compare_methods": r"(.|\n)*accel: Spectrum\(\) +\d\.\d\dx",
    "lora": r"(.|\n)*'unet/sepia': 'C.*'unet/trophy': 'C",
    "own_model": r"largest change: 0\.\d+ methods +FirstBlockCache\nshare computed  [1-8]\d\.",
    "patch_image": r"(.|\n)*PSNR (2[5-9]|[34]\d)\.\d dB, SSIM (0\.9|1)",
    "patch_video": r"(.|\n)*[2-6]\d% of the blocks were computed",
    "stream": r"wrote 24 pictures",
}
"""What each prints, from its beginning."""
FILES = {
    "batch": 7,  # pictures and the manifest
    "calibrate": 1,
    "compare_methods": 1,
    "lora": 4,
    "patch_image": 4,
    "patch_video": 4,
    "stream": 24,
}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_are_short_and_say_how_to_run_them(file) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    told = ast.get_docstring(ast.parse(text))
    assert told is not None and f"python examples/{file.name}" in told
    assert file.stem in SAID


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_run(file, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(file), "out"])
    runpy.run_path(str(file), run_name="__main__")
    said = capsys.readouterr().out
    assert re.match(SAID[file.stem], said), said
    made = [each for each in (tmp_path / "out").glob("*") if each.is_file()]
    assert len(made) >= FILES.get(file.stem, 0), made
