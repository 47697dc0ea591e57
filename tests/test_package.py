"""The package's structure: what may import what, what ships to the Hub, and that the documents say what is true."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import modular_t5


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modular_t5"

# Each may import those before it.
ROOMS = [
    "assembly_modular_t5",
    "choosing_modular_t5",
    "configuration_modular_t5",
    "building_modular_t5",
    "layout_modular_t5",
    "storage_modular_t5",
    "loading_modular_t5",
    "own_parts_modular_t5",
    "modeling_modular_t5",
    "replacing",
    "training_args",
    "distillation",
    "recording",
    "lessons",
    "reducing",
    "loss_sums",
    "checkpoints",
    "adapters",
    "pairs",
    "significance",
    "baselines",
    "measuring",
    "latency",
    "calibration",
    "presenting",
    "frontier",
    "model_card",
    "configuration_compact_t5",
    "matrices_compact_t5",
    "modeling_compact_t5",
    "compacting",
    "feed_forwards",
    "embeddings",
    "heads",
    "layers",
    "offline",
    "trainer",
    "rebuilding",
    "exports",
    "comparison_methods",
    "comparison_results",
    "comparison",
    "cli",
]
SHIPPED = [room for room in ROOMS if room.endswith("_t5")]
PURE = ["assembly_modular_t5", "choosing_modular_t5", "layout_modular_t5", "replacing"]


def imports_of(room):
    """(top-level modules, siblings) that a file imports, wherever in it."""
    outside, siblings = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{room} imports from outside the package by a relative name"
            if node.level:
                assert node.module, f"{room} says 'from . import ...', which the Hub does not ship"
                siblings.add(node.module)
            else:
                outside.add(node.module.split(".")[0])
    return outside, siblings


def test_every_file_has_a_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room):
    outside, siblings = imports_of(room)
    assert siblings <= set(ROOMS[: ROOMS.index(room)])
    assert "modular_t5" not in outside
    if room not in ("trainer", "comparison_methods"):
        assert "trainer" not in siblings


@pytest.mark.parametrize("room", SHIPPED)
def test_what_ships_needs_transformers_and_what_it_needs_alone(room):
    outside, siblings = imports_of(room)
    assert outside - set(sys.stdlib_module_names) <= {"torch", "transformers", "safetensors", "huggingface_hub"}
    assert siblings <= set(SHIPPED)


@pytest.mark.parametrize("room", PURE)
def test_choosing_plans_needs_no_torch(room):
    outside, _ = imports_of(room)
    assert outside <= set(sys.stdlib_module_names)


def test_the_public_names_exist():
    assert len(set(modular_t5.__all__)) == len(modular_t5.__all__)
    assert all(hasattr(modular_t5, name) for name in modular_t5.__all__)


def test_ruff_is_clean():
    for command in (("check",), ("format", "--check")):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone_and_works(tmp_path):
    import zipfile

    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    installed = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*") if path.is_file()}
    assert {name for name in installed if ".dist-info/" not in name} == {
        "modular_t5/py.typed",
        *(f"modular_t5/{path.name}" for path in PACKAGE.glob("*.py")),
        *(f"modular_t5/model_cards/{path.name}" for path in (ROOT / "model_cards").glob("*.jinja")),
    }
    assert "modular-t5 = modular_t5.cli:main" in next((tmp_path / "site").glob("*.dist-info/entry_points.txt")).read_text()
    # What was unpacked in place of the checkout.
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import modular_t5; print(modular_t5.__file__); "
    code += "bank = modular_t5.ModularT5ForConditionalGeneration(modular_t5.ModularT5Config(num_layers=6, d_model=8)); "
    code += "bank.save_pretrained('bank'); print(bank.new_card('org/bank'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert "# bank\n" in done.stdout
