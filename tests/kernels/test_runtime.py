"""Foundations of the kernels: imports without Triton, the repaired interpreter, recording, selection by measurement."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from presto_rt import kernels, native
from presto_rt.errors import BackendUnavailableError, InvalidInputError, MissingDependencyError
from presto_rt.kernels import adaln, runtime
from presto_rt.kernels.autotune import KernelSelector
from presto_rt.kernels.runtime import INTERPRET, dot, jit, tl  # noqa: F401  (kernels below see them as globals)
from tests.support.kernels import assert_written_once, interpreted_only

ROOT = Path(__file__).parents[2]


def python(code: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_import_loads_neither_triton_nor_torch():
    done = python("import sys, presto_rt.kernels; print('triton' in sys.modules, 'torch' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


USE_EVERYTHING = """
import importlib.util, json, logging, sys
lines = []
logging.basicConfig(level="INFO", format="%(name)s %(message)s", stream=sys.stderr)
logging.getLogger("presto_rt").handle = lambda record: lines.append(record.getMessage())
logging.getLogger("presto_rt.kernels").handle = lambda record: lines.append(record.getMessage())
import torch
from presto_rt import kernels, native
from presto_rt.errors import BackendUnavailableError
for name in kernels.__all__:
    getattr(kernels, name)
errors = []
for _ in range(2):  # the second time says nothing
    x = torch.randn(1, 3, 8)
    _, y = kernels.adaln.adaln(x, x)
    assert abs(float(y.mean())) < 1e-6
    assert kernels.attention.attention(*torch.randn(3, 1, 1, 4, 16)).shape == (1, 1, 4, 16)
    assert kernels.sampler_step.normal(kernels.sampler_step.seeds_tensor([1]), (5,)).shape == (1, 5)
    assert torch.ops.presto_rt.pcm(torch.zeros(1, 2, 3)).shape == (1, 3, 2)
try:
    kernels.adaln.adaln(x, x, backend="triton")
except BackendUnavailableError as error:
    errors.append(str(error))
found = {name: importlib.util.find_spec(name) is not None for name in ("triton", "presto_rt._C")}
print(json.dumps({"lines": lines, "errors": errors, "found": found, "gpu": torch.cuda.is_available()}))
"""


def clone(folder: Path, removed: tuple[str, ...]) -> str:
    """Return Python code that puts a bare clone and all installed packages except `removed` on the path."""
    ignore = shutil.ignore_patterns("weights", "__pycache__", *(("_C.*",) if "_C" in removed else ()))
    for package in ("presto_rt", "kernels"):
        shutil.copytree(ROOT / package, folder / "clone" / package, ignore=ignore)
    site = folder / "site"
    site.mkdir()
    for installed in (Path(path) for path in sys.path if path.endswith("-packages")):
        for entry in installed.iterdir():
            if not (site / entry.name).exists() and not entry.name.lower().startswith(
                ("presto", "__editable", *removed)
            ):
                (site / entry.name).symlink_to(entry)
    return f"import sys; sys.path[:0] = [{str(folder / 'clone')!r}, {str(site)!r}]\n"


@pytest.mark.parametrize("removed", [(), ("triton", "_C")])
def test_fallback_logs_one_line_per_missing_part(tmp_path, removed):
    """No GPU, no Triton, no compiled module, nothing installed: files that are not there, not modules that are hidden.

    `-S` leaves out site-packages, and with it Triton and the installed package itself.
    """
    code = clone(tmp_path, removed) + USE_EVERYTHING
    done = python(code, "-I", "-S", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    has_triton, has_native = "triton" not in removed, "_C" not in removed and native.lib is not None
    assert told["found"] == {"triton": has_triton, "presto_rt._C": has_native}
    assert told["gpu"] is False
    reasons = ["Triton needs a GPU" if has_triton else "Triton is not installed"]
    reasons += [] if has_native else ["C++ operators are not used"]
    assert len(told["lines"]) == len(reasons), told["lines"]
    for reason in reasons:
        assert any(reason in line for line in told["lines"]), told["lines"]
    (error,) = told["errors"]
    assert ("move it to a GPU" if has_triton else "pip install triton") in error


def test_report_without_triton_names_the_dependency(monkeypatch):
    monkeypatch.setattr(runtime, "triton", None)
    with pytest.raises(MissingDependencyError, match="pip install triton"):
        kernels.report.main(["adaln"])


def test_package_names_its_modules_for_an_unknown_attribute():
    with pytest.raises(AttributeError, match="it has adaln, attention"):
        _ = kernels.nothing
    assert set(kernels.OPERATORS) < set(dir(kernels))


@pytest.mark.parametrize("name", kernels.OPERATORS)
def test_operator_module_has_function_reference_and_configurations(name):
    module = importlib.import_module(f"presto_rt.kernels.{name}")
    function = module.linear if name == "gemm" else getattr(module, name)
    assert "InvalidInputError:" in function.__doc__.partition("Raises:")[2]
    assert any(part.endswith("_reference") for part in dir(module))
    assert callable(module.shipped)


@jit
def raw_product_kernel(a_ptr, b_ptr, out_ptr, LIFTED: tl.constexpr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    zero = tl.zeros((16, 16), tl.float32)
    out = dot(a, b, zero) if LIFTED else tl.dot(a, b, zero)
    tl.store(out_ptr + at, out)


@interpreted_only
def test_dot_guard_rejects_raw_bf16_products(request):
    """Without the guard of all kernel tests, such a product would be silently wrong; runtime.dot is right."""
    from triton.runtime.errors import InterpreterError

    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    expected, out = a.float() @ b.float(), torch.empty(16, 16)
    raw_product_kernel[(1,)](a, b, out, LIFTED=True)
    torch.testing.assert_close(out, expected)
    with pytest.raises(InterpreterError, match="lift the operands with runtime"):
        raw_product_kernel[(1,)](a, b, out, LIFTED=False)


@interpreted_only
def test_interpreter_rounds_to_nearest_even():
    x = torch.cat(
        [torch.randn(4000) * 10.0 ** torch.randint(-4, 4, (4000,)), torch.tensor([1.00390625, 1.01171875, 0.0])]
    )

    @jit
    def narrow_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < 4003, other=0.0)
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < 4003)

    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        clipped = x.clamp(-440, 440)
        out = torch.zeros(4003).to(dtype)
        narrow_kernel[(1,)](clipped, out, BLOCK=4096)
        assert torch.equal(out.float(), clipped.to(dtype).float())


@interpreted_only
def test_assert_written_once_finds_double_and_missing_writes():
    @jit
    def careless_kernel(out_ptr, SHIFT: tl.constexpr):
        tl.store(out_ptr + tl.program_id(0) * SHIFT + tl.arange(0, 4), 1.0)

    careless = careless_kernel
    assert_written_once(lambda: careless[(2,)](out, SHIFT=4), out := torch.empty(8))
    with pytest.raises(AssertionError, match="2 elements never written"):
        assert_written_once(lambda: careless[(2,)](out, SHIFT=2), out)
    with pytest.raises(AssertionError, match="2 elements written more than once"):
        assert_written_once(lambda: careless[(2,)](out, SHIFT=2), out[:6])
    with pytest.raises(AssertionError, match="1 outside"):
        assert_written_once(lambda: careless[(1,)](out, SHIFT=4), out[:3])


def test_recording_collects_launches_and_runs_nothing():
    x = torch.empty(1, 7, 1024, dtype=torch.bfloat16, device="meta")
    with runtime.recording(80) as launches:
        y = adaln.adaln(x, x)[1]
    (item,) = launches
    assert y.is_meta
    assert item.kernel is adaln.adaln_kernel
    assert item.grid == (7, 1)
    assert item.constants["N"] == 1024


def test_use_triton_checks_the_backend():
    x = torch.randn(1, 3, 8)
    assert runtime.use_triton(x, "torch") is False
    with pytest.raises(InvalidInputError, match="use 'auto', 'triton' or 'torch'"):
        runtime.use_triton(x, "cuda")
    if not runtime.interpreting:
        with pytest.raises(BackendUnavailableError, match="move it to a GPU"):
            runtime.use_triton(x, "triton")


def test_kernel_selector_takes_the_fastest_that_works(monkeypatch, caplog):
    """With made-up times: a candidate that raises is left out, and each device and key is measured once."""
    times = {"slow": 2.0, "fast": 1.0}

    def milliseconds(call):
        found = call()
        if isinstance(found, Exception):
            raise found
        return times[found]

    monkeypatch.setattr("presto_rt.kernels.autotune.milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ways = {
        "slow": lambda: "slow",
        "fast": lambda: "fast",
        "broken": lambda: AssertionError("head dim\nand more"),
        "missing": lambda: MissingDependencyError("not installed"),
    }
    selector, first, second = KernelSelector("test"), torch.device("cuda", 0), torch.device("cuda", 1)
    assert selector.fastest(first, "key", lambda: ways, "slow") == "fast"
    assert selector.fastest(first, "key", dict, "slow") == "fast"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "test: broken left out, it failed: head dim"
    ]
    times["fast"] = 3.0
    assert selector.fastest(second, "key", lambda: ways, "fast") == "slow"
    assert selector.fastest(first, "other", lambda: {"broken": ways["broken"]}, "slow") == "slow"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert selector.fastest(first, "new", lambda: ways, "fast") == "fast"
    assert (first, "new") not in selector.selected
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    full = ways | {"greedy": lambda: torch.OutOfMemoryError("CUDA out of memory")}
    with pytest.raises(torch.OutOfMemoryError):  # not remembered as a way that fails
        selector.fastest(first, "new", lambda: full, "slow")
    assert (first, "new") not in selector.selected


@pytest.mark.gpu
def test_kernel_selector_measures_the_gpu_and_not_the_host():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    big, small = torch.randn(1024, 1024, device="cuda"), torch.randn(8, 8, device="cuda")

    def chatty():  # nothing for the GPU, for the host more than the large product takes
        time.sleep(20e-6)
        return small @ small

    ways = {"big": lambda: big @ big, "chatty": chatty}
    assert KernelSelector("test").fastest(big.device, "key", lambda: ways, "big") == "chatty"
