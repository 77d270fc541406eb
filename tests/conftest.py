"""Shared by all tests: skipping what needs a CUDA device, and the entry points of this source tree."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import presto_rt

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` with a reason if there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def entry_points(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Register the entry points of pyproject.toml, here and in child processes, as an installation does.

    The metadata of a source tree is written when it is installed and may be older than its pyproject.toml.
    """
    site = tmp_path_factory.mktemp("site")
    metadata = site / f"presto_rt-{presto_rt.__version__}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: presto-rt\nVersion: {presto_rt.__version__}\n")
    groups = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        yield
