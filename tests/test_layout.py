"""The folders, the wheel and the imports are as the architecture says."""

import ast
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from accel import registry

ROOT = Path(__file__).parent.parent
PARTS = ("caches", "samplers", "kernels", "pipelines")
CONTRACTS = {
    *("method", "family", "clock", "hooks", "site", "chain", "denoiser", "report", "signals"),
    *("block_calls", "geometry", "guard", "guidance", "adapters", "model_calls", "sublayer"),
    *("memory_budget", "optimal_steps", "similarity_filter", "stream_batch", "stream_session"),
    *("layout", "noise_levels", "staging", "transitions", "stages", "crossing", "low_rank"),
    *("staged_scheduler", "text_bias", "attention_calls", "latent_upsampler", "trained_folder"),
    *("adapter_files", "adapter_hosts", "branch_states"),
}
SHARED = {
    *("accel.caches.approximators", "accel.caches.block_adjustment", "accel.caches.schedules"),
    *("accel.caches.histories", "accel.caches.products", "accel.samplers.vgdfr"),
    "accel.kernels.principal_attention",
}
TENSOR_FUNCTIONS = {"accel.kernels.relative_l1", "accel.kernels.weighted_sum"}
"""Kernels that everybody may call: they know tensors and nothing else."""


def sources() -> list[Path]:
    return [file for part in ("accel", *PARTS) for file in (ROOT / part).glob("*.py")]


def imported(file: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "accel":
            names |= {f"accel.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
    return {name for name in names if name.startswith("accel.")}


def test_parts_have_no_init_and_are_flat() -> None:
    for part in PARTS:
        assert not (ROOT / part / "__init__.py").exists()
        assert not [p for p in (ROOT / part).iterdir() if p.is_dir() and p.name != "__pycache__"]


def test_plain_part_names_are_not_ours() -> None:
    for part in PARTS:
        spec = importlib.util.find_spec(part)
        assert spec is None or spec.origin is None or not spec.origin.startswith(str(ROOT))


def test_contracts_import_contracts_only() -> None:
    for name in CONTRACTS:
        allowed = {f"accel.{contract}" for contract in CONTRACTS} | TENSOR_FUNCTIONS
        assert imported(ROOT / "accel" / f"{name}.py") <= allowed, name


def test_parts_import_contracts_and_shared_functions_only() -> None:
    allowed = {f"accel.{contract}" for contract in CONTRACTS} | SHARED | TENSOR_FUNCTIONS
    for part in PARTS:
        for file in (ROOT / part).glob("*.py"):
            found = imported(file)
            if part == "kernels":  # tensor functions build on each other; methods install them
                found = {name for name in found if not name.startswith("accel.kernels.")}
            assert found <= allowed, file


def test_assembly_reaches_parts_through_the_registry() -> None:
    for file in (ROOT / "accel").glob("*.py"):
        if file.name != "__init__.py":
            reached = {name for name in imported(file) if name.split(".")[1] in PARTS}
            assert reached <= TENSOR_FUNCTIONS, file


def test_importing_accel_loads_no_torch() -> None:
    code = "import sys, accel; dir(accel); assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_can_be_imported() -> None:
    import accel

    for name in accel.__all__:
        assert getattr(accel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = accel.Nothing


def test_every_method_has_a_page() -> None:
    for place in registry.METHODS.values():
        page = ROOT / "docs" / "methods" / f"{place.split(':')[0].rsplit('.', 1)[1]}.md"
        assert page.exists(), page


def test_ci_runs_the_readme_commands() -> None:
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"```sh\n(.*?)\n```", readme, re.S)
    assert len(commands) == 2
    flat = script.replace(" -q ", " ")
    assert 'pip install torch==2.13.0 && pip install -e ".[test,dev]" && pytest' in commands[1]
    assert 'pip install torch==2.13.0 && pip install -e ".[test,dev]" && pytest' in flat


def test_tracked_files_stay_small() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {
        name: (ROOT / name).stat().st_size
        for name in listed.stdout.split("\0")
        if name and (ROOT / name).is_file()
    }
    assert max(sizes.values()) <= 16_000_000
    assert sum(sizes.values()) < 50_000_000


@pytest.mark.slow
def test_wheel_holds_exactly_the_sources(tmp_path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"),
            *("-w", str(tmp_path), str(ROOT)),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        f"accel/{file.name}"
        if file.parent.name == "accel"
        else f"accel/{file.parent.name}/{file.name}"
        for file in sources()
    }
    assert {name for name in names if name.endswith(".py")} == expected
    zoo = [file for file in (ROOT / "zoo").rglob("*") if file.is_file()]
    assert {f"accel/zoo/{file.relative_to(ROOT / 'zoo')}" for file in zoo} <= names
