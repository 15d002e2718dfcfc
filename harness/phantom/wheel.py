"""Finds and fetches PyTorch's CUDA build and NVIDIA's headers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from alst_impl.config import Frozen

SUPPORTED = (13,)
"""Supported major versions of CUDA."""
MACHINES = ("x86_64", "aarch64")
HEADERS = ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h")
"""Headers that the runtime includes. The last is in a separate package that PyTorch does not depend on."""
PEERS = ("liger-kernel>=0.8,<0.9", "triton>=3.7,<3.8", "arctic-training>=0.8,<0.9")
"""Packages that the released ALST recipes use. Installed without dependencies, because
arctic-training requires another transformers."""


class Wheel(Frozen):
    """An installed CUDA build of PyTorch."""

    folder: Path
    """Folder to put first on the Python path."""
    version: str
    """Such as 2.13.0+cu130."""
    cuda: str
    """Such as 13.0."""

    @property
    def libraries(self) -> Path:
        """Folder of its shared objects."""
        return self.folder / "torch" / "lib"

    @property
    def cuda_number(self) -> int:
        """`CUDA_VERSION` of CUDA's headers without the last digit: 1300."""
        major, minor = map(int, self.cuda.split("."))
        return major * 100 + minor


def home() -> Path:
    """The folder of the CUDA build, the headers and the built libraries. The variable `ALST_PHANTOM` sets another."""
    named = os.environ.get("ALST_PHANTOM")
    return Path(named) if named else Path(__file__).resolve().parents[2] / ".phantom"


def wheel_in(folder: Path) -> Wheel | None:
    """The CUDA build of PyTorch in `folder`; None if there is none. Does not import it."""
    path = folder / "torch" / "version.py"
    if not path.is_file():
        return None
    text = path.read_text()
    cuda = re.search(r"^cuda.*= '([\d.]+)'", text, re.MULTILINE)
    version = re.search(r"^__version__ = '(.+)'", text, re.MULTILINE)
    if cuda is None or version is None:
        return None
    return Wheel(folder=folder, version=version[1], cuda=cuda[1])


def environment_folder() -> Path | None:
    """Where this environment's torch is installed."""
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parents[1] if found and found.origin else None


def find() -> Wheel:
    """The CUDA build to use: the fetched one, else the environment's own. Raises `ValueError` if neither."""
    check_platform()
    own = environment_folder()
    found = wheel_in(home() / "torch") or (wheel_in(own) if own else None)
    if found is None:
        raise ValueError(
            f"no CUDA build of PyTorch in {home() / 'torch'} or in this environment; fetch one (0.5 GB) with "
            "`python -m harness.phantom.wheel`"
        )
    if int(found.cuda.split(".")[0]) not in SUPPORTED:
        raise ValueError(
            f"PyTorch {found.version} is built for CUDA {found.cuda}; phantom devices know CUDA "
            f"{', '.join(map(str, SUPPORTED))}: fetch a build of it with `python -m harness.phantom.wheel`"
        )
    return found


def check_platform() -> None:
    """Raises `ValueError` on a platform without support for phantom devices."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise ValueError(
            f"phantom devices need Linux on {' or '.join(MACHINES)}, this is {sys.platform} on "
            f"{platform.machine()}; run it there, or in a container of such a system"
        )


def headers(wheel: Wheel) -> Path:
    """NVIDIA's headers of the wheel's CUDA version. Raises `ValueError` if they are not there."""
    folders = [home() / f"headers-{wheel.cuda}", wheel.folder]
    for folder in folders:
        include = folder / "nvidia" / f"cu{wheel.cuda.split('.')[0]}" / "include"
        if all((include / name).is_file() for name in HEADERS):
            return include
    raise ValueError(
        f"no CUDA {wheel.cuda} headers in {folders[0]}; fetch them with `python -m harness.phantom.wheel`"
    )


def peers() -> Path:
    """The folder of the packages `PEERS`."""
    return home() / "peers"


def fetch_peers() -> None:
    """Install `PEERS` below `home()`, if they are not there."""
    if not peers().is_dir():
        install(peers(), *PEERS)


def fetch() -> None:
    """Install what is missing below `home()`: the CUDA build of this environment's PyTorch version,
    and its headers.
    """
    check_platform()
    own = environment_folder()
    wheel = wheel_in(home() / "torch") or (wheel_in(own) if own else None)
    if wheel is None:
        version = importlib.metadata.version("torch").split("+")[0]
        # `===` compares the whole version: `==` would also take a CPU build of it.
        install(home() / "torch", f"torch==={version}")
        wheel = wheel_in(home() / "torch")
        if wheel is None:
            raise ValueError(
                f"torch {version} of the package registry is no CUDA build on this platform"
            )
    try:
        headers(wheel)
    except ValueError:
        install(
            home() / f"headers-{wheel.cuda}",
            f"nvidia-cuda-runtime=={wheel.cuda}.*",
            f"nvidia-cuda-crt=={wheel.cuda}.*",
        )
        headers(wheel)


def install(folder: Path, *requirements: str) -> None:
    """Install `requirements` into a temporary folder, then rename it to `folder`. A failed download
    leaves no `folder`.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(partial),
    ]
    # Constraints apply to the environment, which this does not change. An empty file disables them.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    done = subprocess.run(
        [*command, *requirements], env=environment, check=False, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ValueError(f"cannot install {' '.join(requirements)}: {reason}")
    partial.rename(folder)


if __name__ == "__main__":
    try:
        fetch()
        if sys.argv[1:] == ["--peers"]:
            fetch_peers()
    except ValueError as error:
        sys.exit(f"phantom: {error}")
