"""Digest of the C++ sources, by which a module that was built from other ones is recognized.

The build compiles the digest into `presto_rt._C`, and `presto_rt.native` compares it where the sources lie beside the
package. CMakeLists.txt runs this file as a script, so it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path


def source_digest(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of all C++ sources, headers and flags below a folder."""
    digest = hashlib.sha256()
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.suffix in (".cpp", ".h", ".txt")}
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


if __name__ == "__main__":
    print(source_digest(Path(sys.argv[1])))
