"""Which weights a model has: one hash of all of them, kept with every result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ssah.models.hashing import digests
from ssah.models.offload import at_hand
from ssah.models.packed import identity, packed_modules
from ssah_kernels.sharded import is_sharded, local

__all__ = ["cheap_weights_hash", "check_same_weights", "weights_hash"]

# Model -> what :func:`_traces` said when its weights were hashed, and the hash.
_HASHED: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()
_SAMPLE = 64  # elements of each tensor


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of all weights and buffers, of a sharded model those of this rank.

    At about 1.4 GB/s and core, on up to 8 cores. Offloaded weights are fetched for it. Of packed
    ones :func:`ssah.models.packed.identity` is hashed: their layout may change as they first run.
    """
    pieces = {name: partial(_weights, module) for name, module in model.named_modules()}
    found = digests(pieces, at_once=1 if _offloaded(model) else 8)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def cheap_weights_hash(model: nn.Module) -> str | None:
    """:func:`weights_hash`, or None where it would cost more than a pass over memory.

    Offloaded weights would be read from the disk once more. Of a sharded model no rank has all.
    Weights that nobody has changed since are not hashed again, since a short scoring pass takes no
    longer than that.
    """
    if _offloaded(model) or any(is_sharded(parameter) for parameter in model.parameters()):
        return None
    traces = _traces(model)
    if traces is None:
        return weights_hash(model)
    known = _HASHED.get(model)
    if known is None or known[0] != traces:
        known = _HASHED[model] = (traces, weights_hash(model))
    return known[1]


def _traces(model: nn.Module) -> str | None:
    """What a change of weights leaves: other memory, a higher version, other values in a sample.

    The sample is for changes through ``.data``, which raise no version. None where nobody can tell:
    of packed weights, and of tensors made in inference mode, which have no version.
    """
    tensors = list(chain(model.parameters(), model.buffers()))
    if packed_modules(model) or any(tensor.is_inference() for tensor in tensors):
        return None
    found = hashlib.sha256(repr([(t.data_ptr(), t._version, t.shape) for t in tensors]).encode())
    samples: dict[torch.device, list[Tensor]] = {}  # one copy from each device
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][: _SAMPLE + 1].contiguous()
        samples.setdefault(tensor.device, []).append(sample.view(torch.uint8))
    for each in samples.values():
        found.update(torch.cat(each).cpu().numpy().tobytes())
    return found.hexdigest()


def check_same_weights(first: str | None, second: str | None, what: str, instead: str) -> None:
    """Refuse two results that must be of the same weights and are not.

    Args:
        first, second: the hashes kept with them; None: nobody knows, and nothing is refused.
        what: the two results, e.g. ``"safety and utility"``.
        instead: what to do.

    Raises:
        ValueError: the weights differ.
    """
    if first is not None and second is not None and first != second:
        raise ValueError(
            f"{what} were measured on different weights ({first[:12]} and {second[:12]}), as of a "
            f"model before and after training, or in two dtypes; they must be of one: {instead}"
        )


def _offloaded(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """What ``module`` itself has of the model's state, not what the modules in it have."""
    if getattr(module, "is_split", False):  # by a plan: the hash is that of the weights as they are
        originals = sorted(module.originals().items())  # type: ignore[operator]
        yield from (tensor for _, tensor in originals if tensor is not None)
        return
    own = {*module._parameters, *(module._buffers.keys() - module._non_persistent_buffers_set)}
    packed = identity(module)
    if packed is not None:
        yield from packed
        own.discard("weight")
    if not own:
        return
    with at_hand(module):
        for name in sorted(own):
            tensor = getattr(module, name)
            if tensor is not None:
                yield local(tensor)
