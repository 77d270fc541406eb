"""The C++ operators: `lib` is the module `presto_rt._C`, or None with the reason in `why`.

Every operator has a torch twin in the Python module that calls it, so a missing `lib` costs speed and nothing else. Set
PRESTO_RT_NO_NATIVE=1 before the first import to force the twins. The reason is logged once, in one line.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

log = logging.getLogger("presto_rt")


def _load() -> tuple[ModuleType | None, str | None]:
    """The module and None, or None and the reason why there is none."""
    if os.environ.get("PRESTO_RT_NO_NATIVE", "0") not in ("", "0"):
        return None, "switched off by PRESTO_RT_NO_NATIVE"
    try:
        module = importlib.import_module("presto_rt._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "presto_rt._C"
        reason = "it was not built; install a C++ compiler and run `pip install` again" if missing else str(error)
        return None, " ".join(reason.split())
    return module, None


lib, why = _load()
if why is not None:
    log.warning("C++ operators are not used: %s", why)
