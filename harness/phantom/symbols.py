"""What PyTorch's libraries ask of NVIDIA's, read from the ELF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alst_impl.config import Frozen

PREFIXES = {
    "nccl": "libnccl.so",
    "cusparseLt": "libcusparseLt.so",
    "cuFile": "libcufile.so",
    "nvshmem": "libnvshmem_host.so",
    "cu": "libcuda.so",
}
"""Whose a function without a version node is, by the beginning of its name; the longest that fits."""
NVIDIA = ("libcu", "libnv", "libnccl")
LAZY = ("libcuda.so.1", "libnvidia-ml.so.1")
"""Libraries that are opened by name when they are needed."""


class Library(Frozen):
    """A shared library to stand for."""

    soname: str
    version: str | None
    """The version node of its symbols."""
    functions: tuple[str, ...]


def libraries(folder: Path) -> list[Library]:
    """The NVIDIA libraries that the shared objects in `folder` are linked with, and what they use of each."""
    from elftools.elf.elffile import ELFFile

    functions: dict[str, set[str]] = {soname: set() for soname in LAZY}
    versions: dict[str, str] = {}
    loose: set[str] = set()
    for path in sorted(folder.glob("*.so")):
        with path.open("rb") as file:
            elf = ELFFile(file)
            for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED"):
                if tag.needed.startswith(NVIDIA):
                    functions.setdefault(tag.needed, set())
            for name, owner, version in undefined(elf):
                if owner in functions:
                    functions[owner].add(name)
                    versions[owner] = version
                elif not owner:
                    loose.add(name)
    for name in loose:
        found = owner_of(name, functions)
        if found is not None:
            functions[found].add(name)
    return [
        Library(soname=s, version=versions.get(s), functions=tuple(sorted(functions[s])))
        for s in sorted(functions)
    ]


def undefined(elf: Any) -> list[tuple[str, str, str]]:
    """Name, library and version of each undefined symbol of an ELF file; the latter two may be empty."""
    needs = elf.get_section_by_name(".gnu.version_r")
    nodes = {
        entry["vna_other"]: (need.name, entry.name)
        for need, entries in (needs.iter_versions() if needs else ())
        for entry in entries
    }
    numbers = elf.get_section_by_name(".gnu.version")
    found = []
    for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
        if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name:
            number = numbers.get_symbol(i)["ndx"] if numbers else None
            found.append((symbol.name, *nodes.get(number, ("", ""))))
    return found


def owner_of(name: str, sonames: dict[str, set[str]]) -> str | None:
    """The library among `sonames` that a function without a version belongs to; None if none of them."""
    for prefix, start in PREFIXES.items():
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and (rest[:1].isupper() or prefix in ("nvshmem", "cusparseLt")):
            return next((s for s in sonames if s.startswith(start)), None)
    return None


def defined(path: Path) -> set[str]:
    """Names of the functions that an object file defines for others."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        return {
            s.name
            for s in table.iter_symbols()
            if s["st_info"]["bind"] == "STB_GLOBAL" and s["st_info"]["type"] == "STT_FUNC"
        }
