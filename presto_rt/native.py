"""The C++ operators: `lib` is the module `presto_rt._C`, or None with the reason in `why`.

Every operator has a torch reference in the Python module that calls it, so a missing `lib` costs speed and nothing
else. Set PRESTO_RT_NO_NATIVE=1 before the first import to use the references. The reason is logged once, in one line.
"""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from types import ModuleType

from .source_digest import source_digest

ROOT = Path(__file__).parent.parent

log = logging.getLogger("presto_rt")


def load() -> tuple[ModuleType | None, str | None]:
    """Return the module and None, or None and the reason for its absence."""
    if os.environ.get("PRESTO_RT_NO_NATIVE", "0") not in ("", "0"):
        return None, "switched off by PRESTO_RT_NO_NATIVE"
    try:
        module = importlib.import_module("presto_rt._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "presto_rt._C"
        reason = "it was not built; install a C++ compiler and run `pip install` again" if missing else str(error)
        return None, " ".join(reason.split())
    # In a checkout the sources may have changed since the build; an installed package has no sources beside it.
    in_checkout = (ROOT / "setup.py").is_file() and (ROOT / "csrc").is_dir()
    if in_checkout and getattr(module, "sources", None) != source_digest(ROOT / "csrc"):
        return None, "presto_rt._C was built from other sources than those in csrc/; run `pip install -e .` again"
    return module, None


lib, why = load()
if why is not None:
    log.warning("C++ operators are not used: %s", why)
