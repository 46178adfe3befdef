"""What a process has one of, put back after every test."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """So that no test depends on those that ran before it."""
    environment, folder, path = dict(os.environ), Path.cwd(), list(sys.path)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch_state, state = torch.get_rng_state(), random.getstate()
    plans, families = set(active_plans()), dict(known_families())
    yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = path
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_rng_state(torch_state)
    random.setstate(state)
    for plan in set(active_plans()) - plans:
        active_plans().discard(plan)
    if families:
        known_families().clear()
        known_families().update(families)


def active_plans() -> Any:
    """Plans in force. Tests of operators alone do not import the library."""
    module = sys.modules.get("ssah.training.optimising.active")
    return module.ACTIVE if module else set()


def known_families() -> Any:
    """Architectures that the library knows; a test may teach it another one."""
    module = sys.modules.get("ssah.units.families")
    return module.FAMILIES if module else {}
