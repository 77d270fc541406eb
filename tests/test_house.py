"""Rules of the house that the tree itself can break: who imports whom, what an import costs, sizes, docstrings."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("presto_rt", "kernels", "tests", "bench", "csrc")
    for suffix in ("py", "cpp", "h")
    for path in (ROOT / folder).rglob(f"*.{suffix}")
)
MODULES = [
    path for path in SOURCES if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("presto_rt", "kernels")
]
MAX_LINES = 450

# Layers from the ground up; a module imports only from its own layer and those below. What is not named here, and the
# helpers that everybody may use (errors, native, ...), is on the ground.
LAYERS = [
    ("kernels",),
    ("presto_rt.models", "presto_rt.diffusion", "presto_rt.text", "presto_rt.audio"),
    ("presto_rt.runtime.engine",),
    ("presto_rt.pipeline",),
    ("presto_rt.cli",),
]

# Loaded when a function needs them, never by `import presto_rt`.
HEAVY = (
    "torch",
    "numpy",
    "soundfile",
    "scipy",
    "music21",
    "librosa",
    "triton",
    "onnxruntime",
    "tokenizers",
    "matplotlib",
)
# Needed for some jobs only, so not loaded even with every module that a generation uses.
OPTIONAL = (
    "music21",
    "librosa",
    "onnxruntime",
    "tinysoundfont",
    "tensorboard",
    "matplotlib",
    "prdc",
    "mido",
    "sklearn",
)
# Brought along by another package; nothing of ours may lean on them.
FOREIGN = ("transformers", "sentence_transformers", "torchaudio", "tensorflow")


def module_name(path: Path) -> str:
    """presto_rt.models.dit for presto_rt/models/dit.py, kernels.adaln for kernels/adaln.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports anywhere; `from a import b` counts as a and a.b."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return {
        name.replace("presto_rt.kernels", "kernels", 1) if name.startswith("presto_rt.kernels") else name
        for name in found
    }


def under(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_the_tree_is_where_these_tests_look() -> None:
    names = {module_name(path) for path in MODULES}
    assert {
        "presto_rt",
        "presto_rt.diffusion.noise",
        "presto_rt.audio",
        "presto_rt.cli",
        "presto_rt.models.dit",
        "kernels",
    } <= names


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    name = module_name(path)
    level = next((i for i, layer in enumerate(LAYERS) if under(name, layer)), None)
    if level is None:
        return
    above = tuple(package for layer in LAYERS[level + 1 :] for package in layer)
    assert not {used for used in imports(path) if under(used, above)}


@pytest.mark.parametrize("path", [path for path in MODULES if under(module_name(path), ("kernels",))], ids=module_name)
def test_kernels_know_no_model(path: Path) -> None:
    ours = {used for used in imports(path) if under(used, ("presto_rt",))}
    assert {used for used in ours if not under(used, ("presto_rt.errors",))} <= {"presto_rt"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_nothing_leans_on_what_another_package_brings_along(path: Path) -> None:
    assert not {used for used in imports(path) if under(used, FOREIGN)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_unfinished(path: Path) -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error", "no " + "cover", "x" + "fail")
    text = path.read_text()
    assert not [mark for mark in marks if mark in text]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_and_what_they_offer_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list)
        and ast.get_docstring(node) is None
    ]
    assert ast.get_docstring(tree), "the module itself"
    assert not missing


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, presto_rt; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = run_python(code)
    assert done.stdout.split() == []
    assert done.stderr == ""


def test_what_a_generation_imports_loads_nothing_optional() -> None:
    names = OPTIONAL + FOREIGN
    used = "import sys, presto_rt; presto_rt.Pipeline; presto_rt.Audio"
    code = f"{used}; print(*[name for name in {names!r} if name in sys.modules])"
    assert run_python(code).stdout.split() == []


def test_importing_all_that_generates_takes_at_most_0_3_s_on_top_of_torch() -> None:
    """In the processor's time, which a busy machine does not change."""
    code = (
        "import time, torch\n"
        "begin = time.process_time()\n"
        "import presto_rt; presto_rt.Pipeline; presto_rt.Audio; presto_rt.load\n"
        "print(time.process_time() - begin)\n"
    )
    assert 0 < float(run_python(code).stdout) < 0.3


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, presto_rt.cli; print('torch' in sys.modules)"
    assert run_python(code).stdout.split() == ["False"]


def test_without_the_cpp_module_it_imports_and_says_so_in_at_most_one_line() -> None:
    for code in ("import presto_rt", "import presto_rt; presto_rt.Pipeline"):
        done = run_python(code, PRESTO_RT_NO_NATIVE="1")
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) <= 1


def test_operators_in_cpp_bind_themselves() -> None:
    """Every file of csrc/ that is compiled binds an operator, but for the module itself and its arguments."""
    files = [p for p in (ROOT / "csrc").rglob("*.cpp") if p.stem not in ("bindings", "tensor_view")]
    assert files
    variants = {p for p in files if p.parent.name == "amx"}  # bound by the operator of the same name in simd/
    assert {p.name for p in variants} <= {p.name for p in files if p.parent.name == "simd"}
    for path in set(files) - variants:
        assert "const Registrar registrar(" in path.read_text(), path
