"""Contents of the distributions: the sources of the C++ operators, every module, and the shipped model alone."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from presto_rt.checkpoints import folder
from presto_rt.errors import WeightsError

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "presto_rt" / "weights" / "nano"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: bytes of a wheel, 100 MB; safetensors files of bfloat16 numbers hardly compress
MAX_WHEEL = 100_000_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Paths that setuptools puts into the source distribution ("sdist") and the package folder ("wheel")."""
    pytest.importorskip("setuptools", minversion="77")
    target = tmp_path_factory.mktemp("distribution")
    call = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(target)]
    call += ["build_py", "--build-lib", str(target / "lib")]
    subprocess.run(call, cwd=ROOT, check=True, capture_output=True, timeout=120)
    listed = (target / "presto_rt.egg-info" / "SOURCES.txt").read_text().split()
    library = target / "lib"
    return {
        "sdist": set(listed),
        "wheel": {str(path.relative_to(library)) for path in library.rglob("*") if path.is_file()},
    }


def test_sdist_has_all_that_it_is_built_from(files: dict[str, set[str]]) -> None:
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "CHANGELOG.md", "presto_rt/py.typed"}
    for source, suffixes in {"csrc": (".cpp", ".h"), "kernels": (".py",), "presto_rt": (".py",)}.items():
        wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / source).rglob("*") if p.suffix in suffixes}
    wanted |= {str(path.relative_to(ROOT)) for path in SHIPPED.iterdir()}
    assert not wanted - files["sdist"]


def test_wheel_has_every_module(files: dict[str, set[str]]) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "presto_rt").rglob("*.py")}
    modules |= {f"presto_rt/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert not modules - files["wheel"]
    assert "presto_rt/py.typed" in files["wheel"]


def test_wheel_has_the_weights_of_the_shipped_model_alone(files: dict[str, set[str]]) -> None:
    weights = {name for name in files["wheel"] if name.startswith("presto_rt/weights/")}
    assert weights == {str(path.relative_to(ROOT)) for path in SHIPPED.iterdir()}
    assert sum((ROOT / name).stat().st_size for name in weights) < MAX_WHEEL


def test_model_that_is_not_in_a_wheel_is_an_error_that_names_the_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out = {path.name for path in SHIPPED.parent.iterdir() if path.is_dir()} - {SHIPPED.name}
    assert left_out == set(folder.REPOSITORY_ONLY)
    monkeypatch.setattr(folder, "SHIPPED", tmp_path)  # the weights of an installed wheel, without the teacher
    for name in left_out:
        with pytest.raises(WeightsError, match="clone the repository"):
            folder.locate(name)
        assert folder.locate(SHIPPED.parent / name) == SHIPPED.parent / name


def test_readme_has_no_image_that_breaks_on_a_package_index() -> None:
    text = (ROOT / PROJECT["project"]["readme"]).read_text()
    assert not re.findall(r"!\[[^]]*\]\((?!https?://)[^)]*\)", text), "images in docs/ are not in a distribution"


def test_documents_link_to_files_of_the_repository() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which does not exist"


def test_extras_of_the_lab_are_those_of_its_parts() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (combined,) = extras["lab"]
    parts = combined.partition("[")[2].rstrip("]").split(",")
    assert set(parts) == {"data", "train", "eval"} <= set(extras)
