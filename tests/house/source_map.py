"""What the house tests know of the source tree: its modules and what each imports."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("library", "networks", "tools", "benchmarks", "finetune")


@dataclass(frozen=True)
class Import:
    """One import statement's target. ``late`` inside a function, ``typing_only`` under ``if TYPE_CHECKING``."""

    target: str
    line: int
    late: bool
    typing_only: bool


def module_name(path: Path) -> str:
    """Dotted name of a source file, seen from the project's folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    """Every Python file of the project itself, tests excluded."""
    scripts = sorted(ROOT.glob("*.py"))
    return scripts + [path for folder in CODE_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def files_of_tests() -> list[Path]:
    """Every Python file below ``tests``."""
    return sorted((ROOT / "tests").rglob("*.py"))


def _is_typing_guard(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _targets(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parent = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parent, base]) if base else ".".join(parent)
    # `from package import module` imports the module: both readings are kept, unknown names are dropped by the user.
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def imports_of(path: Path) -> list[Import]:
    """Every import statement of a file, at any depth."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: list[Import] = []

    def visit(node: ast.AST, late: bool, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                found.extend(Import(t, child.lineno, late, typing_only) for t in _targets(child, package))
            elif isinstance(child, ast.If) and _is_typing_guard(child):
                for statement in child.body:
                    visit(ast.Module([statement], []), late, True)
                for statement in child.orelse:
                    visit(ast.Module([statement], []), late, typing_only)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                visit(child, late or inside, typing_only)

    visit(ast.parse(path.read_text("utf-8"), str(path)), False, False)
    return found


def module_graph() -> dict[str, set[str]]:
    """Module -> own modules that it needs when it is imported (late and typing-only imports left out)."""
    files = {module_name(path): path for path in source_files()}
    return {
        name: {i.target for i in imports_of(path) if not i.late and not i.typing_only and i.target in files} - {name}
        for name, path in files.items()
    }
