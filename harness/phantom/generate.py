"""Writes C source for the functions that a stub library does not implement: harmless ones succeed,
all others refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

ERRORS = {
    "libcudart": 801,
    "libcuda": 801,
    "libcublas": 15,
    "libcublasLt": 15,
    "libcudnn": 3000,
    "libnccl": 5,
    "libcusparse": 10,
    "libcusparseLt": 10,
    "libcusolver": 9,
    "libcufft": 16,
    "libcurand": 103,
    "libcupti": 27,
    "libnvrtc": 11,
    "libcufile": 5001,
    "libnvidia-ml": 3,
}
"""Library -> its return code for *not supported*. Functions of a library that is not listed abort the process."""
TEXT = re.compile(r"Get(Error|Status|LastError)(String|Name)$")
"""Functions that return text."""


def harmless() -> dict[str, str]:
    """Function -> why it may succeed and do nothing."""
    loaded: dict[str, str] = yaml.safe_load(Path(__file__).with_name("harmless.yaml").read_text())
    return loaded


def stubs(soname: str, functions: Iterable[str]) -> str:
    """C source of `functions` of the library `soname`."""
    base = soname.split(".so", maxsplit=1)[0]
    allowed = harmless()
    lines = ['#include "phantom.h"', "#include <stdlib.h>"]
    for name in sorted(functions):
        if name in allowed:
            body = "long {name}(void) {{ return 0; }}"
        elif TEXT.search(name):
            body = 'const char *{name}(void) {{ return "phantom: refused"; }}'
        elif base in ERRORS:
            body = 'long {name}(void) {{ return phantom_refuse("{soname}", "{name}", {error}); }}'
        else:
            body = 'long {name}(void) {{ phantom_refuse("{soname}", "{name}", -1); abort(); }}'
        lines.append(body.format(name=name, soname=soname, error=ERRORS.get(base)))
    return "\n".join(lines) + "\n"


def version_script(version: str | None) -> str:
    """Linker script that puts all symbols under the version node `version`."""
    return f"{version} {{ global: *; }};\n" if version else ""
