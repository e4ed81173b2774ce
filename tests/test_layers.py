"""Imports point one way: ops <- nn <- models <- tasks <- build <- commands."""

import ast
from pathlib import Path

import lba_exp

ROOT = Path(lba_exp.__file__).parent
BASE = {"errors", "registry"}
MAY_IMPORT = {
    "ops": BASE,
    "nn": BASE | {"ops"},
    "models": BASE | {"ops", "nn"},
    "data": BASE | {"messages"},
    "results": BASE | {"messages", "ops", "nn", "models"},
    "devices": BASE,
    "tasks": BASE | {"ops", "nn", "models", "devices"},
    "convert": BASE | {"ops", "nn", "models"},
    "export": BASE | {"ops", "nn", "models", "convert", "callbacks", "results", "messages", "evaluating"},
    "callbacks": BASE | {"ops", "nn", "models", "results", "config", "devices"},
    "bench": BASE | {"ops", "nn", "callbacks", "data", "results", "messages", "composing", "build"},
    "inference": BASE | {"ops", "nn", "models", "data", "callbacks", "results", "config", "messages", "composing", "build"},
    "errors": set(),
    "registry": {"errors"},
    "config": BASE | {"config_parts"},
    "config_parts": BASE,
    "messages": BASE,
    "checks": BASE | {"config", "config_parts", "messages", "data", "nn"},
    "config_files": BASE | {"checks", "messages"},
    "trials": BASE,
    "composing": BASE | {"config", "config_files", "messages", "checks", "trials"},
    "tracking": BASE | {"callbacks", "results"},
}


def imports(path: Path) -> set[str]:
    """Rooms of lba_exp that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the full name of an import"
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "lba_exp" else {node.module}
    return {name.split(".")[1] for name in found if name.startswith("lba_exp.")}


def test_imports_point_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in MAY_IMPORT:
            wrong += [f"{path.relative_to(ROOT)} imports {other}" for other in imports(path) - MAY_IMPORT[room] - {room}]
    assert wrong == []


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 330}
    assert long == {}
