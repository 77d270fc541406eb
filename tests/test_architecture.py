"""Rules of the architecture (docs/architecture.md), each on the real tree and on a small source that breaks it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.support import architecture
from tests.support.sources import ROOT, Module, imports, read_tree

PRODUCT = read_tree("presto_rt", "kernels")
EVERYTHING = [*PRODUCT, *read_tree("bench", "tests", "examples")]
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("presto_rt", "kernels", "tests", "bench", "examples", "csrc")
    for suffix in ("py", "cpp", "h")
    for path in sorted((ROOT / folder).rglob(f"*.{suffix}"))
}
DOCUMENTS = "\n".join(
    path.read_text()
    for path in [ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml", *ROOT.glob("docs/*.md")]
)

#: names of environment variables that Python code reads or sets
VARIABLES = re.compile(r"environ(?:\.get\(|\[)\s*\"([A-Z_]+)\"|\"(PRESTO_RT_[A-Z_]+)\" (?:not )?in os\.environ")

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
# Installed because another package needs them; the product does not depend on them.
FOREIGN = ("transformers", "sentence_transformers", "torchaudio", "tensorflow")


def lines(offenders: list[str]) -> str:
    """All offenders, one a line, for the message of a failed test."""
    return f"{len(offenders)} offenders:\n  " + "\n  ".join(offenders)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_tree_is_where_the_rules_look() -> None:
    names = {module.name for module in PRODUCT}
    assert {"presto_rt", "presto_rt.pipeline", "presto_rt.diffusion.noise", "presto_rt.lab", "kernels.adaln"} <= names
    assert len(TEXTS) > len(EVERYTHING) > len(PRODUCT) > 100


def test_imports_go_down() -> None:
    offenders = architecture.upward_imports([*PRODUCT, *read_tree("bench")])
    assert not offenders, lines(offenders)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("presto_rt.runtime.plan", "from ..pipeline import Pipeline"),
        ("presto_rt.runtime.cpu.ops", "def run():\n    from ...loading import load"),
        ("presto_rt.diffusion.noise", "if TYPE_CHECKING:\n    from ..runtime.plan import Plan"),
        ("presto_rt.request", "import presto_rt.pipeline"),
        ("presto_rt.errors", "from presto_rt import pipeline"),
        ("kernels.adaln", "from presto_rt.runtime import plan"),
        ("presto_rt.newcomer", ""),
        ("presto_rt.newcomer.part", ""),
    ],
)
def test_imports_go_down_finds_a_broken_source(name: str, text: str) -> None:
    others = ("presto_rt.pipeline", "presto_rt.loading", "presto_rt.runtime", "presto_rt.runtime.plan")
    modules = [Module("presto_rt", "", is_package=True), *(Module(other, "") for other in others if other != name)]
    assert architecture.upward_imports([*modules, Module(name, text)])


def test_imports_have_no_circle() -> None:
    offenders = architecture.circles(PRODUCT)
    assert not offenders, lines(offenders)


def test_imports_have_no_circle_finds_circles_of_modules_and_of_packages() -> None:
    modules = [
        Module("presto_rt.models.a", "from .b import x"),
        Module("presto_rt.models.b", "def late():\n    from .a import y"),
    ]
    assert architecture.circles(modules) == ["modules: presto_rt.models.a -> presto_rt.models.b -> presto_rt.models.a"]
    packages = [
        Module("presto_rt.models.a", "from ..runtime.a import x"),
        Module("presto_rt.models.b", ""),
        Module("presto_rt.runtime.a", ""),
        Module("presto_rt.runtime.b", "from ..models import b"),
    ]
    assert architecture.circles(packages) == ["packages: presto_rt.models -> presto_rt.runtime -> presto_rt.models"]


def test_nothing_outside_the_lab_imports_it() -> None:
    offenders = architecture.lab_imports(PRODUCT)
    assert not offenders, lines(offenders)


@pytest.mark.parametrize("text", ["from ..lab.data import cli", "from presto_rt import lab", "import presto_rt.lab"])
def test_nothing_outside_the_lab_imports_it_finds_a_broken_source(text: str) -> None:
    assert architecture.lab_imports([Module("presto_rt.cli.main", text), Module("presto_rt.lab", "", True)])


def test_kernels_import_no_model() -> None:
    offenders = architecture.kernel_imports(PRODUCT)
    assert not offenders, lines(offenders)


def test_kernels_import_no_model_finds_a_broken_source() -> None:
    assert architecture.kernel_imports([Module("kernels.pcm", "from presto_rt.diffusion import noise")])


def test_shared_code_names_no_model_family() -> None:
    offenders = architecture.family_names(PRODUCT)
    assert not offenders, lines(offenders)


@pytest.mark.parametrize(
    "text",
    [
        'def load(name="nano"): ...',
        "from ..models.dit import DiT",
        "def run(network: DiT): ...",
        "minilm_tokens = 3",
        "class OobleckDecoder: ...",
        'if kind == "stable-audio": ...',
        "if TYPE_CHECKING:\n    from ..conditioning import t5",
    ],
)
def test_shared_code_names_no_model_family_finds_a_broken_source(text: str) -> None:
    assert architecture.family_names([Module("presto_rt.runtime.plan", text)])
    assert not architecture.family_names([Module("presto_rt.checkpoints.folder", text)])


def test_shared_code_names_no_model_family_allows_words_that_contain_one() -> None:
    text = '"""Stable order; for example load("nano")."""\nnanoseconds = sort(stable=True)'
    assert not architecture.family_names([Module("presto_rt.runtime.plan", text)])


def test_shared_code_has_no_constant_of_a_model() -> None:
    offenders = architecture.model_constants(PRODUCT)
    assert not offenders, lines(offenders)


@pytest.mark.parametrize(
    "text", ["HOP = 2_048", "from ..models.config import SAMPLE_RATE", "n = config.KEY_CHANNELS", "rate = 44_100"]
)
def test_shared_code_has_no_constant_of_a_model_finds_a_broken_source(text: str) -> None:
    assert architecture.model_constants([Module("presto_rt.request", text)])


def test_every_module_has_a_caller() -> None:
    offenders = architecture.orphans(PRODUCT, DOCUMENTS)
    assert not offenders, lines(offenders)


def test_every_module_has_a_caller_finds_orphans_and_undocumented_commands() -> None:
    command = Module("presto_rt.lab.fit", 'if __name__ == "__main__":\n    pass')
    orphan = Module("presto_rt.wing", "import presto_rt.wing")
    assert len(architecture.orphans([orphan, command], "")) == 2
    assert len(architecture.orphans([orphan, command], "run `python -m presto_rt.lab.fit`")) == 1
    callers = [
        Module("presto_rt", 'NAMES = {"fly": ".wing"}', True),
        Module("presto_rt.cli", "from .. import wing", True),
    ]
    for caller in callers:
        assert not architecture.orphans([orphan, caller], "")
    kernels = [Module("kernels", 'OPERATORS = ("wing",)', True), Module("kernels.wing", "")]
    assert architecture.orphans(kernels, ""), "the table of all operators is no caller"


def test_modules_exempt_from_callers_exist_and_have_none() -> None:
    known = {module.name for module in PRODUCT}
    exempt = (*architecture.KERNEL_TABLES, *architecture.NO_CALLER)
    callers = [module for module in PRODUCT if module.name not in exempt]
    called = {name for module in callers for name in imports(module, known)}
    assert set(architecture.NO_CALLER) <= known
    assert not set(architecture.NO_CALLER) & called, "it has a caller now: remove it from NO_CALLER"


def test_docstrings_open_with_an_imperative_or_a_noun() -> None:
    offenders = architecture.docstring_openings(EVERYTHING)
    assert not offenders, lines(offenders)


@pytest.mark.parametrize("word", ["What", "Which", "Whether", "Who", "Where", "Everything", "How", "When"])
def test_docstrings_open_with_an_imperative_or_a_noun_finds_a_broken_source(word: str) -> None:
    assert architecture.docstring_openings([Module("a", f'class A:\n    def f(self):\n        """{word} it is."""')])
    assert not architecture.docstring_openings([Module("a", '"""Whatever, however: whereas."""')])


def test_modules_and_public_names_have_docstrings() -> None:
    offenders = architecture.missing_docstrings(PRODUCT)
    assert not offenders, lines(offenders)


def test_modules_and_public_names_have_docstrings_finds_a_broken_source() -> None:
    text = "def f(): ...\nclass A: ...\ndef _private(): ..."
    assert architecture.missing_docstrings([Module("a", text)]) == ["a (the module)", "a.f", "a.A"]


def test_parameters_are_described_from_five_on() -> None:
    offenders = architecture.undocumented_parameters(PRODUCT)
    assert not offenders, lines(offenders)


def test_parameters_are_described_from_five_on_finds_a_broken_source() -> None:
    four, five = "def f(a, b, c, d): ...", "def f(a, b, c, *, d, e): ..."
    described = (
        'def f(a, b, c, d, e):\n    """F.\n\n    Args:\n        a, b: x.\n        c (B, T): y.\n        d: z.\n{}"""'
    )
    method = "class A:\n    def __init__(self, a, b, c, d, e): ..."
    assert not architecture.undocumented_parameters([Module("a", four)])
    assert architecture.undocumented_parameters([Module("a", five)])
    assert architecture.undocumented_parameters([Module("a", method)])
    (offender,) = architecture.undocumented_parameters([Module("a", described.format(""))])
    assert offender.endswith("no line for e")
    assert not architecture.undocumented_parameters([Module("a", described.format("        e: w.\n"))])


def test_runtime_has_at_most_twelve_modules_beside_its_backends() -> None:
    modules = architecture.runtime_modules(PRODUCT)
    assert 0 < len(modules) <= architecture.MAX_RUNTIME_MODULES, lines(modules)


def test_runtime_modules_are_counted_without_backends() -> None:
    modules = [Module("presto_rt.runtime.plan", ""), Module("presto_rt.runtime.cpu.ops", "")]
    assert architecture.runtime_modules([*modules, Module("presto_rt.runtime", "", True)]) == ["presto_rt.runtime.plan"]


def test_pipeline_is_short_and_does_not_branch_on_a_backend() -> None:
    (pipeline,) = (module for module in PRODUCT if module.name == "presto_rt.pipeline")
    assert len(pipeline.text.splitlines()) <= architecture.MAX_PIPELINE_LINES
    offenders = architecture.backend_branches(pipeline)
    assert not offenders, lines(offenders)


@pytest.mark.parametrize(
    "text",
    [
        'if self.device.type == "cuda": pass',
        "x = a if self.graph is None else b",
        "while backend: pass",
        "match self.backend:\n    case _: pass",
    ],
)
def test_pipeline_does_not_branch_on_a_backend_finds_a_broken_source(text: str) -> None:
    assert architecture.backend_branches(Module("presto_rt.pipeline", text))
    assert not architecture.backend_branches(Module("presto_rt.pipeline", "x = self.backend.run(1)\nif seed: pass"))


def test_nothing_imports_a_package_of_another_package() -> None:
    offenders = architecture.foreign_imports(PRODUCT, FOREIGN)
    assert not offenders, lines(offenders)


def test_nothing_imports_a_package_of_another_package_finds_a_broken_source() -> None:
    assert architecture.foreign_imports([Module("a", "from transformers.models import x")], FOREIGN)


def test_tests_and_benchmarks_use_public_names() -> None:
    offenders = architecture.private_names(read_tree("tests", "bench", "examples"))
    assert not offenders, lines(offenders)


def test_tests_and_benchmarks_use_public_names_finds_a_broken_source() -> None:
    assert architecture.private_names([Module("tests.a", "from presto_rt.cli.main import _parser")])
    assert architecture.private_names([Module("tests.a", "from presto_rt import loading\nloading._cache.clear()")])
    assert not architecture.private_names([Module("tests.a", "from torch import nn\nnn._x")])


def test_files_can_be_read_in_one_sitting() -> None:
    offenders = architecture.long_files(TEXTS)
    assert not offenders, lines(offenders)
    assert architecture.long_files({"long.py": "\n" * (architecture.MAX_LINES + 1)})


def test_nothing_is_left_unfinished() -> None:
    offenders = architecture.unfinished(TEXTS)
    assert not offenders, lines(offenders)
    assert architecture.unfinished({"a.py": "# TO" + "DO: later"})


def test_formatter_is_switched_off_in_fewer_than_thirty_lines() -> None:
    offenders = architecture.unformatted(TEXTS)
    assert len(offenders) < architecture.MAX_UNFORMATTED, lines(offenders)
    assert architecture.unformatted({"a.py": "x = 1\ny  = 2  # fmt: " + "skip"}) == ["a.py:2"]


def test_environment_variables_are_documented() -> None:
    document = (ROOT / "docs" / "environment.md").read_text()
    found = {
        name: file
        for file, text in [*TEXTS.items(), ("setup.py", (ROOT / "setup.py").read_text())]
        for groups in VARIABLES.findall(text)
        for name in groups
        if name and name != "PATH"
    }
    assert {"PRESTO_RT_NO_NATIVE", "XDG_CACHE_HOME", "CXX"} <= set(found)
    offenders = [f"{name} of {file}" for name, file in found.items() if f"`{name}`" not in document]
    assert not offenders, lines(offenders)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, presto_rt; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = run_python(code)
    assert done.stdout.split() == []
    assert done.stderr == ""


def test_importing_the_pipeline_loads_nothing_optional() -> None:
    names = OPTIONAL + FOREIGN
    used = "import sys, presto_rt; presto_rt.Pipeline; presto_rt.Audio; presto_rt.load"
    code = f"{used}; print(*[name for name in {names!r} if name in sys.modules])"
    assert run_python(code).stdout.split() == []


def test_importing_the_pipeline_takes_at_most_0_3_s_on_top_of_torch() -> None:
    """In the processor's time, which a busy machine does not change."""
    code = (
        "import time, torch\n"
        "begin = time.process_time()\n"
        "import presto_rt; presto_rt.Pipeline; presto_rt.Audio; presto_rt.load\n"
        "print(time.process_time() - begin)\n"
    )
    assert 0 < float(run_python(code).stdout) < 0.3


def test_command_line_starts_without_torch() -> None:
    code = "import sys, presto_rt.cli; print('torch' in sys.modules)"
    assert run_python(code).stdout.split() == ["False"]


def test_package_imports_without_its_cpp_module_with_at_most_one_line_of_output() -> None:
    for code in ("import presto_rt", "import presto_rt; presto_rt.Pipeline"):
        done = run_python(code, PRESTO_RT_NO_NATIVE="1")
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) <= 1
