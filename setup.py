"""Builds the C++ module `presto_rt._C` and lists the packages; everything else is in pyproject.toml.

The module is optional. It is built through CMake where CMake is installed and by calling the C++ compiler directly
where it is not; without any compiler the install goes on, says so in one line, and the torch twins of the operators
are used.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))

# -ffp-contract=off: no fused multiply-adds, so every operator gives the same bits on every machine and in its torch
# twin. The other two change no result; they only let the compiler vectorise square roots and selections.
FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]

# All is built for a portable baseline. The files in csrc/simd are compiled again for each of these instruction sets,
# and csrc/isa.cpp chooses among them when the module is loaded. CMakeLists.txt says the same.
X86 = platform.machine() in ("x86_64", "AMD64")
BASELINE = ["-march=x86-64-v2"] if X86 else []
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "bf16")), "-mprefer-vector-width=512"]
ISAS = {"base": [], "avx2": AVX2, "avx512": AVX512} if X86 else {"base": []}
AMX = [*AVX512, "-mamx-tile", "-mamx-bf16", "-DPRESTO_RT_ISA=amx"]  # of the files in csrc/amx, compiled once


def compiler() -> list[str] | None:
    """The C++ compiler's command, $CXX first; None when there is none."""
    for command in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    return None


def accepts(command: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows these flags."""
    call = [*command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(call, capture_output=True).returncode == 0


class BuildNative(build_ext):
    """Builds the one extension through CMake or, without CMake, with one call of the compiler."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        command = compiler()
        if command is None:
            message = "no C++ compiler found: presto_rt._C is left out and the slower torch twins are used"
            print(f"warning: {message}", file=sys.stderr)
            return
        has_make = any(shutil.which(tool) for tool in ("ninja", "make"))
        try:
            if shutil.which("cmake") and has_make:
                self.with_cmake(target)
            else:
                self.with_compiler(command, target)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"building presto_rt._C failed (exit status {error.returncode}); its output is above"
            ) from None

    def with_cmake(self, target: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *generator, *defines], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        target.unlink(missing_ok=True)  # never write into a file that a running process has mapped
        shutil.copyfile(build / target.name, target)

    def with_compiler(self, command: list[str], target: Path) -> None:
        import pybind11

        includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        shared = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        objects = []
        # Tiles are younger than the rest: a compiler that does not know them leaves those kernels out.
        amx = X86 and accepts(command, AMX)
        defines = ["-DPRESTO_RT_AMX"] if amx else []
        for source in SOURCES:
            folder = Path(source).parent.name
            if folder == "amx":
                variants = {"amx": AMX} if amx else {}
            else:
                variants = {"": [], **{i: [*f, f"-DPRESTO_RT_ISA={i}"] for i, f in ISAS.items() if folder == "simd"}}
            for name, flags in variants.items():
                objects.append(str(build / f"{Path(source).stem}{name and '.' + name}.o"))
                call = [*command, *FLAGS, *BASELINE, *defines, *flags, *includes, "-c", source, "-o", objects[-1]]
                subprocess.run(call, check=True, cwd=ROOT)
        subprocess.run([*command, *shared, "-pthread", *objects, "-o", str(target)], check=True, cwd=ROOT)


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
