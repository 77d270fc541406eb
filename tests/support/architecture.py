"""Checkers of the architecture rules, each a function from parsed sources to a list of offenders.

A checker receives modules and returns one line for each offence, so that `tests/test_architecture.py` can run it on the
real tree (no offenders) and on small broken sources (at least one).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.support.sources import Module, code_words, cycles, imported_names, imports, named_modules, under

#: Layers from the ground up. A module imports from its own layer and from those below.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("presto_rt.errors", "presto_rt.native", "presto_rt.source_digest"),
    ("presto_rt.diffusion", "presto_rt.audio", "kernels"),
    ("presto_rt.runtime", "presto_rt.models", "presto_rt.conditioning"),
    ("presto_rt.checkpoints", "presto_rt.request", "presto_rt.deadline", "presto_rt.latency_store"),
    ("presto_rt.pipeline", "presto_rt.loading", "presto_rt.streaming", "presto_rt"),
    ("presto_rt.serve", "presto_rt.cli"),
    ("presto_rt.lab", "bench"),
)
#: Code that every model runs through.
SHARED = (
    "presto_rt.diffusion",
    "presto_rt.runtime",
    "presto_rt.request",
    "presto_rt.deadline",
    "presto_rt.pipeline",
    "presto_rt.loading",
    "presto_rt.streaming",
)
#: Words that name one family of models, in identifiers and in strings other than docstrings.
FAMILY_WORDS = re.compile(
    r"(?<![a-z0-9])(nano|sao|sa3|t5)(?![a-z0-9])|minilm|oobleck|t5gemma|stable[-_ ]?(audio|dit)", re.IGNORECASE
)
#: Classes and modules of one family. `runtime.dit`, the forward pass of all transformers, is shared.
FAMILY_CLASSES = {"DiT", "StableDiT"}
FAMILY_MODULES = (
    "presto_rt.models.dit",
    "presto_rt.models.stable_dit",
    "presto_rt.models.oobleck",
    "presto_rt.models.same",
    "presto_rt.conditioning.minilm",
    "presto_rt.conditioning.t5",
    "presto_rt.conditioning.t5gemma",
)
#: Sizes of one model: fields of its specification, never globals of shared code.
MODEL_CONSTANTS = {
    "HOP",
    "SAMPLE_RATE",
    "MAX_SECONDS",
    "MAX_FRAMES",
    "KEY_CHANNELS",
    "BEAT_CHANNELS",
    "LATENT_CHANNELS",
    "TEXT_TOKENS",
    "TEXT_WIDTH",
    "SIGMA_DATA",
}
MODEL_NUMBERS = {44_100}
#: Modules without a caller in the product, and the reason.
NO_CALLER = {
    "kernels.snake_conv1d": "decoders of open checkpoints will call it; it has a reference, tests and a benchmark",
    "kernels.conv_transpose1d": "decoders of open checkpoints will call it; it has a reference, tests and a benchmark",
}
KERNEL_TABLES = ("kernels", "kernels.report")
#: Names that choose a device or a backend; `Pipeline` does not branch on them.
DEVICE_NAMES = {"device", "backend", "graph", "engine", "cuda", "is_cuda"}
DOCSTRING_OPENINGS = re.compile(r"(What|Which|Whether|Who|Whose|Where|Everything|How|When)\b")
MAX_LINES = 450
MAX_PIPELINE_LINES = 200
MAX_RUNTIME_MODULES = 12
MAX_UNFORMATTED = 30
ARGS_FROM = 5
UNFINISHED = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error", "no " + "cover", "x" + "fail")


def layer_of(name: str) -> int | None:
    """Index of a module's layer by the longest entry of LAYERS that covers it; None if none does."""
    covering = [
        (len(entry), level)
        for level, layer in enumerate(LAYERS)
        for entry in layer
        # The package itself stands for its __init__ alone, or every new module would have a layer.
        if (name == entry if entry == "presto_rt" else under(name, (entry,)))
    ]
    return max(covering)[1] if covering else None


def upward_imports(modules: list[Module]) -> list[str]:
    """Imports that go up, and modules that are in no layer."""
    known = {module.name for module in modules}
    offenders = []
    for module in modules:
        level = layer_of(module.name)
        if level is None:
            offenders.append(f"{module.name} is in no layer: add its package to LAYERS")
            continue
        for used in sorted(imports(module, known) & known):
            above = layer_of(used)
            if above is not None and above > level:
                offenders.append(f"{module.name} (layer {level}) imports {used} (layer {above})")
    return offenders


def circles(modules: list[Module]) -> list[str]:
    """Import circles between modules, and between packages (the entries of LAYERS)."""
    known = {module.name for module in modules}
    graph = {module.name: imports(module, known) & known for module in modules}
    packages: dict[str, set[str]] = {}
    for name, targets in graph.items():
        group = package_of(name)
        packages.setdefault(group, set()).update(package_of(target) for target in targets)
        packages[group].discard(group)
    found = [f"modules: {' -> '.join(path)}" for path in cycles(graph)]
    return found + [f"packages: {' -> '.join(path)}" for path in cycles(packages)]


def package_of(name: str) -> str:
    """The entry of LAYERS that a module belongs to; the parts of lab/ are packages of their own."""
    if under(name, ("presto_rt.lab",)):
        return ".".join(name.split(".")[:3])
    entries = [entry for layer in LAYERS for entry in layer if entry != "presto_rt" and under(name, (entry,))]
    return max(entries, key=len) if entries else name


def lab_imports(modules: list[Module]) -> list[str]:
    """Imports of lab/ by the runtime."""
    known = {module.name for module in modules}
    return [
        f"{module.name} imports {used}"
        for module in modules
        if not under(module.name, ("presto_rt.lab", "bench"))
        for used in sorted(imports(module, known))
        if under(used, ("presto_rt.lab",))
    ]


def kernel_imports(modules: list[Module]) -> list[str]:
    """Imports of kernels/ from the package, other than its errors and its C++ module."""
    known = {module.name for module in modules}
    return [
        f"{module.name} imports {used}"
        for module in modules
        if under(module.name, ("kernels",))
        for used in sorted(imports(module, known))
        if under(used, ("presto_rt",)) and used not in ("presto_rt", "presto_rt.errors", "presto_rt.native")
    ]


def family_names(modules: list[Module]) -> list[str]:
    """Names of model families in shared code: words of identifiers and strings, classes, imported modules."""
    known = {module.name for module in modules}
    offenders = []
    for module in modules:
        if not under(module.name, SHARED):
            continue
        offenders += [
            f"{module.name} imports {used}"
            for used in sorted(imports(module, known | set(FAMILY_MODULES)))
            if under(used, FAMILY_MODULES)
        ]
        for line, text in sorted(set(code_words(module))):
            if text in FAMILY_CLASSES or FAMILY_WORDS.search(text):
                offenders.append(f"{module.name}:{line} names {text!r}")
    return offenders


def model_constants(modules: list[Module]) -> list[str]:
    """Constants of one model in shared code: their names, or their numbers."""
    offenders = []
    for module in modules:
        if not under(module.name, SHARED):
            continue
        words = sorted(set(code_words(module)))
        offenders += [f"{module.name}:{line} has {text}" for line, text in words if text in MODEL_CONSTANTS]
        offenders += [
            f"{module.name}:{node.lineno} has the number {node.value}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Constant) and not isinstance(node.value, bool) and node.value in MODEL_NUMBERS
        ]
    return offenders


def orphans(modules: list[Module], documents: str = "") -> list[str]:
    """Modules without a caller: no other module imports or names them, and they are no documented command.

    A module is named by a string that holds its dotted name, absolute or relative (a table of lazy imports, an entry
    point). A command is a module with `if __name__ == "__main__"` whose `python -m NAME` stands in `documents`. The
    tables and the report of the kernels go through all of them and are no callers.
    """
    known = {module.name for module in modules}
    called: set[str] = set(NO_CALLER)
    for module in modules:
        if module.name in KERNEL_TABLES:
            continue
        called |= imports(module, known)
        called |= {name for name in named_modules(module) if name in known} - {module.name}
    offenders = []
    for module in modules:
        if (
            module.is_package
            or module.name in called
            or module.name in KERNEL_TABLES
            or module.name.endswith("__main__")
        ):
            continue
        installed = f"presto_rt.{module.name}" if under(module.name, ("kernels",)) else module.name
        if 'if __name__ == "__main__"' in module.text and f"-m {installed}" in documents:
            continue
        if f'"{installed}:' in documents:
            continue
        offenders.append(f"{module.name} has no caller: connect it, or remove it")
    return offenders


def docstring_openings(modules: list[Module]) -> list[str]:
    """Docstrings that open with a question word instead of an imperative or a noun phrase."""
    return [
        f"{module.name}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}"
        for module in modules
        for node, text in module.docstrings
        if DOCSTRING_OPENINGS.match(text)
    ]


def missing_docstrings(modules: list[Module]) -> list[str]:
    """Modules, public functions and public classes without a docstring."""
    offenders = []
    for module in modules:
        if ast.get_docstring(module.tree) is None:
            offenders.append(f"{module.name} (the module)")
        offenders += [
            f"{module.name}.{node.name}"
            for node in module.tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and "overload" not in [ast.unparse(decorator) for decorator in node.decorator_list]
            and ast.get_docstring(node) is None
        ]
    return offenders


def undocumented_parameters(modules: list[Module]) -> list[str]:
    """Public functions of five parameters or more that do not describe each of them below `Args:`.

    The parameters of `__init__` may stand in the docstring of the class. A method without a docstring, or with
    "See `Protocol.name`.", takes that of a method of the same name that documents them. "Args: as in `name`" and
    "Arguments as in `name`." refer to the parameters of another function.
    """
    functions = [(module, *entry) for module in modules for entry in _public_functions(module.tree)]
    documented = {
        function.name for _, function, text in functions if function.name != "__init__" and "Args:" in (text or "")
    }
    offenders = []
    for module, function, text in functions:
        names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        names = [name for name in names if name not in ("self", "cls")]
        refers = text is None or text.startswith("See `")
        if len(names) < ARGS_FROM or (refers and function.name in documented):
            continue
        if re.search(r"\bArguments (are )?(as )?(in `|there|those of `)", text or ""):
            continue
        described = (text or "").partition("Args:")[2]
        if described.startswith(" as in `"):
            continue
        missing = [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}\b[^:\n]*:", described)]
        if missing:
            offenders.append(f"{module.name}:{function.lineno} {function.name}: no line for {', '.join(missing)}")
    return offenders


def _public_functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, str | None]]:
    """Yield public functions and methods with the docstring that describes their parameters."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and _is_documented_kind(node):
            yield node, ast.get_docstring(node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    yield method, "\n".join(filter(None, (ast.get_docstring(node), ast.get_docstring(method))))
                elif isinstance(method, ast.FunctionDef) and _is_documented_kind(method):
                    yield method, ast.get_docstring(method)


def _is_documented_kind(function: ast.FunctionDef) -> bool:
    decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    return not function.name.startswith("_") and not re.search(r"\b(overload|jit)\b", decorators)


def runtime_modules(modules: list[Module]) -> list[str]:
    """Modules of runtime/ beside its backends."""
    return [m.name for m in modules if re.fullmatch(r"presto_rt\.runtime\.\w+", m.name) and not m.is_package]


def backend_branches(module: Module) -> list[str]:
    """Conditions in a module that read the name of a device or of a backend."""
    offenders = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            condition: ast.expr = node.test
        elif isinstance(node, ast.Match):
            condition = node.subject
        else:
            continue
        names = {n.id for n in ast.walk(condition) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(condition) if isinstance(n, ast.Attribute)}
        if names & DEVICE_NAMES:
            offenders.append(f"{module.name}:{node.lineno} branches on {ast.unparse(condition)}")
    return offenders


def foreign_imports(modules: list[Module], foreign: tuple[str, ...]) -> list[str]:
    """Imports of packages that are installed only because another package needs them."""
    return [
        f"{module.name} imports {source}"
        for module in modules
        for source, _ in imported_names(module)
        if under(source, foreign)
    ]


def private_names(modules: list[Module]) -> list[str]:
    """Private names of the package that tests or benchmarks import, or read from an imported module of it."""
    offenders = []
    for module in modules:
        ours: set[str] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and under(node.module or "", ("presto_rt", "kernels")):
                ours |= {alias.asname or alias.name for alias in node.names}
                offenders += [
                    f"{module.name}:{node.lineno} imports {alias.name}"
                    for alias in node.names
                    if _is_private(alias.name) and alias.name != "_C"
                ]
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                owner = node.value
                if isinstance(owner, ast.Name) and owner.id in ours:
                    offenders.append(f"{module.name}:{node.lineno} reads {ast.unparse(node)}")
    return offenders


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def long_files(texts: dict[str, str]) -> list[str]:
    """Files that are too long to be read in one sitting."""
    counts = {name: len(text.splitlines()) for name, text in texts.items()}
    return [f"{name} has {count} lines" for name, count in counts.items() if count > MAX_LINES]


def unfinished(texts: dict[str, str]) -> list[str]:
    """Files with marks of unfinished work."""
    return [f"{name} has {mark!r}" for name, text in texts.items() for mark in UNFINISHED if mark in text]


def unformatted(texts: dict[str, str]) -> list[str]:
    """Lines that switch the formatter off."""
    mark = "fmt: " + "skip"
    return [
        f"{name}:{number}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if mark in line
    ]
