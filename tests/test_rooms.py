"""Imports go one way through the house."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tnt_jax"
FLOORS = ("errors fields", "tasks", "config user_cache", "c_compiler chips", "data models", "storage", "training")
FLOORS += ("inference", "evaluation planning", "visualize", "export demo", "commands")
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, at its top or inside its functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [f"{node.module}.{alias.name}" for node in froms for alias in node.names]
    assert not any(node.level for node in froms), "relative imports hide a room's name"
    return {module.split(".")[1] for module in modules if module.startswith("tnt_jax.")}


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_room_imports_only_rooms_below_it(room):
    files = sorted((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    for file in files:
        above = {other for other in imported(file) if other != room and FLOOR[other] >= FLOOR[room]}
        assert not above, f"{file.relative_to(PACKAGE.parent)} imports {', '.join(sorted(above))}"


def test_no_folder_of_tests_is_found_as_somebodys_package():
    """Where PyTorch is missing, `import torch` would find tests/storage/torch."""
    folders = {path.name for path in Path(__file__).parent.rglob("*") if path.is_dir()}
    assert not folders & {"torch", "timm", "transformers", "datasets", "tensorflow", "gradio", "onnx", "jax", "flax"}


def test_every_room_has_a_floor():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules | {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == FLOOR.keys()
    assert len(modules) <= 8
