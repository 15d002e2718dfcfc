"""Runs at the start of every Python process of a program on phantom devices, before the
environment's own `sitecustomize`.
"""

import importlib.machinery
import importlib.util
import os
import sys

import phantom_agent

phantom_agent.install()

_here = os.path.dirname(os.path.abspath(__file__))
_rest = [entry for entry in sys.path if os.path.abspath(entry or ".") != _here]
_next = importlib.machinery.PathFinder.find_spec("sitecustomize", _rest)
if _next is not None and _next.loader is not None:
    _next.loader.exec_module(importlib.util.module_from_spec(_next))
