"""Data flows one way: a room imports only from the rooms before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "slimdown"

ORDER = [
    ["version", "errors", "suggest"],
    ["files", "core", "images", "zeros"],
    ["load"],
    ["capture"],
    ["prune"],
    ["sparsify"],
    ["quantize"],
    ["distill"],  # trains what quantize made, too
    ["targets"],
    ["measure"],
    ["report"],
    ["store", "plan"],
    ["verdict"],
    ["recipe"],
    ["saved"],
    ["bench"],
    ["steps"],
    ["pipeline"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
WITHOUT_DATA = {
    "capture",
    "prune",
    "sparsify",
    "distill",
    "quantize",
    "targets",
    "measure",
    "report",
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("slimdown."))


def test_every_room_imports_only_from_rooms_before_it() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for imported in imports(path):
            if imported == room or room not in LEVEL:  # the command line may use every room
                continue
            if LEVEL.get(imported, len(ORDER)) >= LEVEL[room] or (
                imported == "load" and room in WITHOUT_DATA
            ):
                wrong.append(f"{path.relative_to(SOURCE)} imports {imported}")
    assert not wrong


def test_every_room_has_its_place() -> None:
    rooms = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if path.suffix != ".typed"}
    rest = {"__init__", "__main__", "__pycache__", "cli", "doctor", "dry_run", "inspect", "demo"}
    assert {room for room in rooms if not room.endswith((".yaml", ".json"))} - rest <= set(LEVEL)
