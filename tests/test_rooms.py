"""The rooms of the package: few, and imports go one way."""

import ast
import graphlib
from pathlib import Path

import hf_attnswap

ROOT = Path(hf_attnswap.__file__).parent


def rooms() -> dict[str, set[str]]:
    """Each file or folder at the top of the package, with those that its files import, also within functions."""
    result: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        imports = result.setdefault(parts[0], set())
        package = ["hf_attnswap", *parts[:-1]]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                module = base + (node.module.split(".") if node.module else [])
                names = [module] if len(module) > 1 else [[*module, alias.name] for alias in node.names]
                imports |= {name[1] if (ROOT / name[1]).exists() or (ROOT / f"{name[1]}.py").exists() else "__init__"
                            for name in names}  # fmt: skip
    return {room: imports - {room} for room, imports in result.items()}


def test_there_are_few_rooms():
    assert len(rooms()) <= 23


def test_no_room_imports_what_imports_it():
    graphlib.TopologicalSorter(rooms()).prepare()  # CycleError names the circle


def test_what_stands_low_imports_little():
    imports = rooms()
    assert imports["masks"] == imports["errors"] == set()
    assert imports["native"] <= {"errors"}
    assert imports["ops"] <= {"masks", "errors", "native"}
    assert imports["attentions"] <= {"masks", "ops", "errors"}
    assert imports["report"] <= {"errors", "sources", "statistics"}
    assert not imports["planning"] & {"training", "tradeoff", "publish", "cli"}
