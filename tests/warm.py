"""Imports what ranks of tests use, once for all of them: each rank is a fork of the process that imported this.

A rank that imports this for itself needs longer for it than for most of what it does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from pathlib import Path

HELPERS = ("harness.processes.preload", "pytest", "training", "small", "loops", "phantoms")
PLUGINS = ("alst_impl.methods", "alst_impl.engines", "alst_impl.sources")
LIBRARIES = ("transformers.trainer", "trl.trainer.sft_trainer")

sys.path.insert(0, str(Path(__file__).parent))  # pytest adds it, but not to the fork server's
for name in HELPERS:
    importlib.import_module(name)
for package in PLUGINS:
    for name in importlib.import_module("alst_impl.plugin").names(package):
        importlib.import_module(f"{package}.{name}")
for name in LIBRARIES:
    with contextlib.suppress(ImportError):  # an extra
        importlib.import_module(name)
# As in `harness.processes.preload`: a rank's garbage collector need not scan all this.
gc.collect()
gc.freeze()
