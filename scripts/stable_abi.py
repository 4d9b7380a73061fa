"""What a compiled `_C` may take from outside: LibTorch's stable ABI, Python's limited API, libc.

    python scripts/stable_abi.py MODULE.so

That is why one binary serves every CPython from 3.10 and every torch from 2.10 on.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ALLOWED = re.compile(
    r"(aoti_)?torch_\w+$"  # LibTorch's stable C interface
    r"|PyModule_Create2$"  # Python's limited API, as much as csrc/module.c takes of it
    r"|.+@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_[\d.]*$"
    r"|(_ITM_\w+|__gmon_start__|__cxa_finalize)$"
)
# What it is linked to, and where torch's libraries are looked for: beside the package.
LIBRARIES = re.compile(
    r"libtorch(_cpu)?\.so$|(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux-.*)\.so"
)
RUNPATH = "$ORIGIN/../torch/lib"


def symbols(binary: Path, option: str) -> list[tuple[str, str]]:
    """(type, name@version) of the dynamic symbols; `option` of nm: --undefined-only and so on."""
    lines = subprocess.check_output(["nm", "-D", option, str(binary)], text=True).splitlines()
    return [(line.split()[-2], line.split()[-1]) for line in lines]


def dynamic(binary: Path, entry: str) -> list[str]:
    """The values of a kind of entries of the dynamic section: NEEDED, RUNPATH."""
    text = subprocess.check_output(["readelf", "-dW", str(binary)], text=True)
    return re.findall(rf"\({entry}\).*\[(.*)\]", text)


def problems(binary: Path) -> list[str]:
    """What ties the binary to more than it may depend on, one line each."""
    undefined = [name for _, name in symbols(binary, "--undefined-only")]
    found = [f"undefined symbol {name}" for name in undefined if not ALLOWED.match(name)]
    if not any(name.startswith("aoti_torch_") for name in undefined):
        found.append("takes nothing from torch's stable ABI: is this the right file?")
    needed = dynamic(binary, "NEEDED")
    found += [f"linked to {name}" for name in needed if not LIBRARIES.match(name)]
    if (path := dynamic(binary, "R(?:UN)?PATH")) != [RUNPATH]:
        found.append(f"looks for torch in {path}, expected {RUNPATH}")
    return found


if __name__ == "__main__":
    said = [line for name in sys.argv[1:] for line in problems(Path(name))]
    print("\n".join(said) or "nothing but the stable ABI")
    sys.exit(1 if said else 0)
