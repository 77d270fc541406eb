"""Build the C++ module `presto_rt._C` and list the packages; everything else is in pyproject.toml.

The module is optional. It is built by CMake where CMake is installed, and by calling the C++ compiler where it is not,
with the flags of csrc/flags.txt either way. Without a compiler the install prints one line and goes on, and the torch
references of the operators are used.
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))


def find_compiler() -> list[str] | None:
    """Return the C++ compiler's command, $CXX first, or None where no compiler is installed."""
    for command in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    return None


def compile_commands(compiler: list[str], build: Path) -> list[list[str]]:
    """Return one call of the compiler for each object file; the last word of each is the object."""
    import pybind11

    lines = (ROOT / "csrc" / "flags.txt").read_text().splitlines()
    flags = {words[0]: words[1:] for line in lines if (words := shlex.split(line, comments=True))}
    digest = runpy.run_path(str(ROOT / "presto_rt" / "source_digest.py"))["source_digest"](ROOT / "csrc")
    includes = [f"-isystem{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    shared = [*compiler, *flags["all"], *includes, f'-DPRESTO_RT_SOURCES="{digest}"']
    variants = [name for name in flags if "/" in name]
    if platform.machine() in ("x86_64", "AMD64"):
        shared += flags["x86"]
        check = [*compiler, *flags["amx/amx"], "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(check, capture_output=True).returncode == 0:
            shared.append("-DPRESTO_RT_AMX")
        else:
            variants.remove("amx/amx")
    else:
        variants = ["simd/base"]

    commands = [
        [*shared, "-c", source, "-o", str(build / f"{Path(source).stem}.o")]
        for source in SOURCES
        if Path(source).parent.name != "amx"
    ]
    for folder, isa in (name.split("/") for name in variants):
        added = [*flags[f"{folder}/{isa}"], f"-DPRESTO_RT_ISA={isa}"]
        commands += [
            [*shared, *added, "-c", source, "-o", str(build / f"{Path(source).stem}.{isa}.o")]
            for source in SOURCES
            if Path(source).parent.name == folder
        ]
    return commands


class BuildNative(build_ext):
    """Build the one extension by CMake or, without CMake, by calls of the compiler."""

    def build_extension(self, ext: Extension) -> None:
        """Build into the package; print one line where no compiler is found, exit where the build fails."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = find_compiler()
        if compiler is None:
            message = "no C++ compiler found: presto_rt._C is left out and the slower torch references are used"
            print(f"warning: {message}", file=sys.stderr)
            return
        has_make = any(shutil.which(tool) for tool in ("ninja", "make"))
        try:
            if shutil.which("cmake") and has_make:
                self.with_cmake(target)
            else:
                self.with_compiler(compiler, target)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"building presto_rt._C failed (exit status {error.returncode}); its output is above"
            ) from None

    def with_cmake(self, target: Path) -> None:
        """Configure and build CMakeLists.txt, and copy the module to `target`."""
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        defines = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *generator, *defines], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        target.unlink(missing_ok=True)  # never write into a file that a running process has mapped
        shutil.copyfile(build / target.name, target)

    def with_compiler(self, compiler: list[str], target: Path) -> None:
        """Compile all objects, as many at a time as there are processors, and link them into `target`."""
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        commands = compile_commands(compiler, build)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True, cwd=ROOT), commands))
        shared = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        objects = [command[-1] for command in commands]
        target.unlink(missing_ok=True)
        subprocess.run([*compiler, *shared, "-pthread", *objects, "-o", str(target)], check=True, cwd=ROOT)


setup(
    packages=[
        *find_packages(include=["presto_rt", "presto_rt.*"]),
        "presto_rt.kernels",
        *(f"presto_rt.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"presto_rt.kernels": "kernels"},
    # `optional` only tells setuptools that the file may be missing when no compiler was found.
    ext_modules=[Extension("presto_rt._C", SOURCES, optional=True)],
    cmdclass={"build_ext": BuildNative},
)
