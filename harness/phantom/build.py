"""Builds the stub libraries into a cache, keyed by PyTorch's version and the sources."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.phantom import generate, symbols
from harness.phantom.wheel import Wheel, headers, home

RUNTIME = Path(__file__).with_name("runtime")
CORE = ("devices.c", "values.c", "launches.c", "host.c")
"""Sources of libphantom.so, which all other libraries link."""
IMPLEMENTED = {
    "libcudart": "cudart.c",
    "libcuda": "cuda.c",
    "libcublas": "cublas.c",
    "libcublasLt": "cublasLt.c",
    "libcudnn": "cudnn.c",
    "libcupti": "cupti.c",
    "libnccl": "nccl.c",
    "libnvidia-ml": "nvml.c",
}
"""Library -> the source of its implemented functions. All other functions are refused."""
DONE = "sonames"
"""The file that lists the built libraries in the order to load them."""


def compiler() -> list[str]:
    """The command of a C compiler. Raises `ValueError` if there is none."""
    found = shutil.which(os.environ.get("CC", "cc"))
    if found:
        return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise ValueError("no C compiler: neither `cc` nor the package 'ziglang'; pip install ziglang")


def cache_key(wheel: Wheel) -> str:
    """Hash of the PyTorch version and of all files that the build reads."""
    digest = hashlib.sha256(f"{wheel.version} {wheel.cuda}".encode())
    here = Path(__file__).parent
    for path in sorted(
        [*RUNTIME.iterdir(), *here.glob("*.yaml"), here / "generate.py", here / "symbols.py"]
    ):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return f"{wheel.version}-{digest.hexdigest()[:12]}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`. The lock is released even if the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def built(wheel: Wheel) -> Path:
    """The folder of the libraries for `wheel`, built if it does not exist.

    The build gets its final name when it is complete, so a folder of that name is complete. Raises
    `ValueError` if there is no compiler, no header or no disk space.
    """
    cache = home() / "cache"
    folder = cache / cache_key(wheel)
    if (folder / DONE).is_file():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / "lock"):
            if not (folder / DONE).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as partial:
                    compile_all(wheel, Path(partial) / "lib")
                    (Path(partial) / "lib").rename(folder)
    except OSError as error:
        raise ValueError(
            f"cannot build phantom libraries in {cache}: {error.strerror or error}"
        ) from None
    return folder


def compile_all(wheel: Wheel, folder: Path) -> None:
    """Compile libphantom and a library for each soname into `folder`."""
    folder.mkdir()
    flags = [
        "-O2",
        "-fPIC",
        "-w",
        f"-I{RUNTIME}",
        f"-I{headers(wheel)}",
        f"-DPHANTOM_CUDA={wheel.cuda_number}",
    ]
    command = [*compiler(), *flags]
    core = [str(RUNTIME / name) for name in CORE]
    run([*command, "-shared", "-fvisibility=hidden", "-o", str(folder / "libphantom.so"), *core,
         "-Wl,-soname,libphantom.so", "-lpthread"])  # fmt: skip
    libraries = symbols.libraries(wheel.libraries)
    for library in libraries:
        link(command, folder, library)
    # Programs also look for the driver by its plain name.
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    for path in (*folder.glob("*.c"), *folder.glob("*.o"), *folder.glob("*.map")):
        path.unlink()
    first = ["libphantom.so", *(x.soname for x in libraries if x.soname.startswith("libcudart."))]
    rest = [x.soname for x in libraries if x.soname not in first]
    (folder / DONE).write_text("\n".join([*first, *rest]) + "\n")


def link(command: Sequence[str], folder: Path, library: symbols.Library) -> None:
    """Compile the stub of `library`."""
    objects: list[str] = []
    answered: set[str] = set()
    source = IMPLEMENTED.get(library.soname.split(".so")[0])
    if source is not None:
        compiled = folder / f"{source}.o"
        run([*command, "-c", "-o", str(compiled), str(RUNTIME / source)])
        objects, answered = [str(compiled)], symbols.defined(compiled)
    stub = folder / f"{library.soname}.c"
    missing = set(library.functions) - answered
    stub.write_text(generate.stubs(library.soname, missing))
    script = folder / f"{library.soname}.map"
    script.write_text(generate.version_script(library.version))
    version = [f"-Wl,--version-script={script}"] if library.version else []
    run([*command, "-shared", "-o", str(folder / library.soname), str(stub), *objects,
         f"-Wl,-soname,{library.soname}", *version, "-Wl,-rpath,$ORIGIN", str(folder / "libphantom.so"), "-ldl"])  # fmt: skip


def run(command: Sequence[str]) -> None:
    """Run a compiler. Raises `ValueError` with its first error."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        first = next((line for line in lines if "error" in line or "No space" in line), lines[-1])
        raise ValueError(f"phantom libraries do not compile with {command[0]}: {first}")
