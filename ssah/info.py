"""What this installation can do: versions, instruction sets, GPU architectures, backends."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

import ssah
from ssah_kernels import backends
from ssah_kernels.backends import cpu, cuda, fatbin
from ssah_kernels.schema import KERNELS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["describe", "describe_model"]


def describe() -> dict[str, Any]:
    """Facts about this installation, as plain data.

    ``backends`` is operator -> backend -> ``""`` if it can run here, else why not; ``chosen`` is
    device type -> the backend that serves it.
    """
    extension = cpu.facts()
    library = cuda.built()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu", *([accelerator.type] if accelerator is not None else [])]
    return {
        "ssah": ssah.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "extension": bool(extension),
        "isa": extension.get("isa"),
        "isa_built": [isa for isa in extension.get("isa_built", "").split(", ") if isa],
        "compiler": extension.get("compiler"),
        "torch_built_with": extension.get("torch_built_with"),
        "cuda_built": library is not None,
        # Read from the file, so that a machine without a GPU can tell too.
        "cuda_archs": fatbin.architectures(library) if library is not None else [],
        "gpu": _gpu(),
        "triton": _version("triton"),
        "chosen": {device: backends.choose(torch.device(device)) for device in devices},
        "backends": {
            op: {backend: backends.missing(backend) or "" for backend in backends.BACKENDS}
            for op in KERNELS
        },
    }


def describe_model(model: nn.Module, name: str) -> dict[str, Any]:
    """What of a model would be scored, and what would not, as plain data.

    Args:
        model: a transformers model; its weights are not read, so that it may be without memory
            (`ssah.models.empty_model`).
        name: what to call it.

    Returns:
        Its class, type and size; per kind of depth-2 module their number, the units of all and
        ``sizes``, pairs of (units, modules that have so many); ``owned``, the parameters that
        belong to units; ``quantised``, how its weights are packed or None; ``not_covered``, the
        parts that hold no units, with their layers.

    Raises:
        ValueError: the architecture is unknown, or there are no such modules.
    """
    # transformers takes seconds to import, and `ssah info` without a model does not need it.
    from ssah.models import describe_packing, n_parameters, text_config
    from ssah.units import KINDS, find_modules, find_not_covered

    found = find_modules(model).values()
    kinds = {}
    for kind in KINDS:
        # Thousands of modules, of a mixture for example, have a few sizes.
        sizes = Counter(module.n_units for module in found if module.kind == kind)
        kinds[kind] = {
            "modules": sizes.total(),
            "units": sum(units * modules for units, modules in sizes.items()),
            "sizes": sorted(sizes.items()),
        }
    owned = 0  # a shared row of V counts once
    for module in found:
        for entries in (*module.inputs, module.output):
            owned += len(entries.index.unique()) * entries.width(model)
    return {
        "name": name,
        "class": type(model).__name__,
        "model_type": text_config(model).model_type,
        "parameters": n_parameters(model),
        "owned": owned,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantised": describe_packing(model),
        "units": sum(module.n_units for module in found),
        "kinds": kinds,
        "not_covered": [
            {
                "part": part.at,
                "instead_of": part.instead,
                "layers": [int(layer.rpartition(".")[2]) for layer in layers],
                "reason": part.reason,
            }
            for part, layers in find_not_covered(model).items()
        ],
    }


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.metadata.version(package)


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()
