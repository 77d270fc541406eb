"""Pytest plugin of `make test-sanitize`: load the sanitized build in place of presto_rt._C."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

found = sorted(Path(os.environ["PRESTO_RT_SANITIZED"]).glob("_C.*.so"))
spec = importlib.util.spec_from_file_location("presto_rt._C", found[0])
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["presto_rt._C"] = module
