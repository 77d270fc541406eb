"""Python sources as the architecture rules read them: names, imports, strings, and circles in an import graph."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Module:
    """A parsed source file: its dotted name (kernels/ keeps that name), its text, and if it is a package."""

    name: str
    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def package(self) -> str:
        """Name of the package that relative imports start from."""
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @cached_property
    def docstrings(self) -> list[tuple[ast.AST, str]]:
        """Every docstring of the module with its node."""
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [(node, ast.get_docstring(node)) for node in ast.walk(self.tree) if isinstance(node, nodes)]
        return [(node, text) for node, text in found if text is not None]


def read_tree(*folders: str, root: Path = ROOT) -> list[Module]:
    """Parse all Python files of some folders below `root`."""
    modules = []
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        modules.append(Module(".".join(parts[:-1] if is_package else parts), path.read_text(), is_package))
    return modules


def under(name: str, packages: Iterable[str]) -> bool:
    """Return True if a module is one of the packages or lies in one of them."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def imported_names(module: Module) -> Iterator[tuple[str, str | None]]:
    """Yield (source, name) of each `from source import name` and (source, None) of each `import source`, made absolute.

    `if TYPE_CHECKING:` and imports inside functions count as any other.
    """
    package = module.package.split(".")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield own_name(alias.name), None
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield own_name(source), alias.name


def imports(module: Module, known: set[str]) -> set[str]:
    """Names of the modules that a module imports: `from a import b` is a.b if that is a module, else a."""
    found = set()
    for source, name in imported_names(module):
        submodule = own_name(f"{source}.{name}")
        found.add(submodule if submodule in known else source)
    return found - {module.name}


def own_name(name: str) -> str:
    """Write the installed name of the kernels as their folder's name."""
    return "kernels" + name.removeprefix("presto_rt.kernels") if under(name, ("presto_rt.kernels",)) else name


def code_words(module: Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each identifier and of each string that is no docstring."""
    docstrings = {id(node.body[0].value) for node, _ in module.docstrings}  # type: ignore[attr-defined]
    for node in ast.walk(module.tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            yield line, node.arg
        elif isinstance(node, ast.alias):
            yield line, node.name.rpartition(".")[2]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield line, node.value


def named_modules(module: Module) -> Iterator[str]:
    """Yield the dotted names, made absolute, that a module's strings may spell: lazy imports and entry points."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"[A-Za-z_][\w.]*", node.value):
                yield own_name(node.value)
                yield f"{module.package}.{node.value}"
            elif re.fullmatch(r"\.[A-Za-z_][\w.]*", node.value):
                yield module.package + node.value


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return one closed path for each strongly connected part of a graph with more than one node."""
    reach = {node: _reachable(graph, node) for node in graph}
    paths, done = [], set()
    for node in sorted(graph):
        circle = {other for other in reach[node] if node in reach.get(other, ())}
        if len(circle) > 1 and node not in done:
            done |= circle
            paths.append(_shortest_circle(graph, node, circle))
    return paths


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def _shortest_circle(graph: dict[str, set[str]], start: str, within: set[str]) -> list[str]:
    paths = [[start]]
    while True:
        longer = []
        for path in paths:
            for target in sorted(graph[path[-1]] & within):
                if target == start:
                    return [*path, start]
                if target not in path:
                    longer.append([*path, target])
        paths = longer
