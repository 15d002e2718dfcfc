"""Functions that PyTorch's libraries need from NVIDIA's, read from the ELF files."""

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
"""Prefix of a function name -> its library, for functions without a version node. The first match counts."""
NVIDIA = ("libcu", "libnv", "libnccl")
LAZY = ("libcuda.so.1", "libnvidia-ml.so.1")
"""Libraries that programs open by name at run time."""


class Library(Frozen):
    """A shared library that needs a stub."""

    soname: str
    version: str | None
    """The version node of its symbols."""
    functions: tuple[str, ...]


def libraries(folder: Path) -> list[Library]:
    """The NVIDIA libraries that the shared objects in `folder` link, with the functions that they use."""
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
    """The library among `sonames` that has a function without a version; None if no library has it."""
    for prefix, start in PREFIXES.items():
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and (rest[:1].isupper() or prefix in ("nvshmem", "cusparseLt")):
            return next((s for s in sonames if s.startswith(start)), None)
    return None


def defined(path: Path) -> set[str]:
    """Names of the global functions that an object file defines."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        return {
            s.name
            for s in table.iter_symbols()
            if s["st_info"]["bind"] == "STB_GLOBAL" and s["st_info"]["type"] == "STT_FUNC"
        }
