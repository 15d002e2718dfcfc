"""Packages that a peer needs and this project's environment lacks: a folder for each peer, put first on its path.

python -m harness.league.packages [PEER]...
"""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import distributions
from pathlib import Path

from harness.cells import league
from harness.phantom.wheel import home, install, peers

SHARED = ("case", "loop")
"""Modules beside the folders, which scripts import."""


def requirements(peer: str) -> Path | None:
    """The list of packages of `peer`; None if the environment has all."""
    path = league.folder() / peer / "requirements.txt"
    return path if path.is_file() else None


def overlay(peer: str) -> Path | None:
    """The folder of the packages of `peer`, whether it is there or not; None if it needs none.

    Its name changes with the list, so that an old folder is never taken for a new one.
    """
    path = requirements(peer)
    if path is None:
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return home() / f"peer-{peer}-{digest}"


def scripts(peer: str) -> list[Path]:
    """The files that decide what the script of `peer` does."""
    folder = league.folder()
    own = [p for p in sorted((folder / peer).rglob("*")) if p.suffix in (".py", ".yaml", ".txt")]
    text = "".join(path.read_text() for path in own if path.suffix == ".py")
    shared = [folder / f"{name}.py" for name in SHARED if f"from {name} import" in text]
    return [*shared, *(path for path in own if path.name != "peer.yaml")]


def inputs(peer: str) -> list[str]:
    """`scripts`, and a file that the installation of the packages made: when they change, `peer` has to run again."""
    folder = overlay(peer)
    made = sorted(folder.glob("*.dist-info/RECORD"))[:1] if folder else []
    return [str(path) for path in (*scripts(peer), *made)]


def missing(peer: str) -> str | None:
    """Why `peer` cannot be imported, in a line; None if it can."""
    folder = overlay(peer)
    if folder is not None and not folder.is_dir():
        return f"its packages are not here; install them with `python -m harness.league.packages {peer}`"
    if version(peer) is None:
        package = league.peers()[peer].package
        return f"package {package} is not installed; `make peers` installs it, or `make install`"
    return None


def version(peer: str) -> str | None:
    """Version of the package of `peer`; None if it is not installed."""
    package, folder = league.peers()[peer].package, overlay(peer)
    path = [*([str(folder)] if folder else []), *sys.path, str(peers())]
    found = next(iter(distributions(name=package, path=path)), None)
    return found.version if found else None


def main(names: list[str]) -> None:
    """Install the packages of the peers `names`, by default of all. Raises `ValueError` for an unknown one."""
    known = league.peers()
    for name in names or known:
        if name not in known:
            raise ValueError(f"unknown peer '{name}'; use one of {', '.join(known)}")
        folder, path = overlay(name), requirements(name)
        if folder is not None and path is not None and not folder.is_dir():
            print(f"{name}: installing {path}")
            install(folder, "--requirement", str(path))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"league: {error}")
