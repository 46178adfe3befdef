"""The projections of a depth-2 module: y = x W^T + b and nothing else, of a weight that is known.

A unit is a column of B and a row of every A. That holds only where a projection computes what its
weight says, so that every other one is refused here, by name.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssah.compat.modules import how_computed
from ssah.models import runs_own_forward, scheme_of
from ssah_kernels.checks import FLOATS
from ssah_kernels.sharded import is_sharded

# Subclasses of nn.Linear whose own forward is nn.Linear's function.
_LINEAR_TOO = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})


def projection(model: nn.Module, name: str) -> nn.Module:
    """The module ``name`` of ``model``, once it is known to be a projection.

    Raises:
        ValueError: there is none; a plan has split it; its forward is not that of ``nn.Linear`` or
            ``Conv1D`` (FP8, adapters, a patched one), or its weight is packed in an unknown way.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"model {type(model).__name__} has no module {name!r}, which the entry of its family "
            "names; register a family that fits it"
        ) from error
    check_unsplit(name, module)  # first: a split projection has no weight to look at
    if scheme_of(module) is not None:
        return module  # what its weight looks like is the scheme's affair
    kind = type(module)
    # Subclasses of both are common, and many compute something else (FP8, adapters).
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (module.out_features, module.in_features)
        usual = kind.forward is nn.Linear.forward
        usual = usual or f"{kind.__module__}.{kind.__qualname__}" in _LINEAR_TOO
    elif isinstance(module, Conv1D):
        shape, usual = (module.nx, module.nf), kind.forward is Conv1D.forward
    else:
        raise ValueError(
            f"module {name!r} is a {kind.__name__}, must be nn.Linear or Conv1D (merge "
            "adapters first; of quantised ones, see ssah.models.packed.SCHEMES, dequantise others)"
        )
    if not usual:
        raise ValueError(
            f"module {name!r} is a {kind.__name__} ({kind.__module__}), whose forward is not that "
            "of nn.Linear or Conv1D, so that its weight does not say what it computes: dequantise "
            "the model, or merge the adapters"
        )
    if not runs_own_forward(module):
        raise ValueError(
            f"module {name!r} has a forward that somebody put in place of {kind.__name__}'s: take "
            f"it off (del model.get_submodule({name!r}).forward). Hooks are honoured"
        )
    check_weight(f"{name}.weight", module.weight)
    # Some schemes keep an nn.Linear and put packed bytes in the place of its weight.
    if tuple(module.weight.shape) != shape:
        raise ValueError(
            f"module {name!r} has a weight of shape {tuple(module.weight.shape)}, must be {shape} "
            "(dequantise the model first)"
        )
    return module


def check_unsplit(name: str, module: nn.Module) -> None:
    """Refuse a module that an active plan has split: it has no weight to read or to change.

    Raises:
        ValueError: it is split; it is named.
    """
    if getattr(module, "is_split", False):
        raise ValueError(
            f"model has an active plan, which has split {name!r} into trained and frozen units: "
            "close it first (plan.close())"
        )


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse, with ValueError, a tensor whose elements are not the numbers that are computed with.

    Args:
        name: of the tensor in the model.
        weight: it, ``[...]``.
    """
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"{name!r} is {weight.dtype}, must be one of {', '.join(map(str, FLOATS))}: "
            "dequantise the model first"
        )
    # A tensor subclass may stand for other numbers than it holds; one sharded by torch does not.
    if type(weight.data) is not Tensor and not is_sharded(weight):
        raise ValueError(
            f"{name!r} is a {type(weight.data).__name__} ({type(weight.data).__module__}), must be "
            "a plain tensor or of a scheme in ssah.models.packed.SCHEMES: dequantise the "
            "model first"
        )


def features(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a projection."""
    if isinstance(module, Conv1D):  # has other names for them
        return module.nx, module.nf
    return module.in_features, module.out_features  # type: ignore[return-value]


def check_width(name: str, module: nn.Module, width: int, down: str) -> None:
    """Refuse, with ValueError, an A called ``name`` that has not ``width`` outputs to feed B."""
    if features(module)[1] != width:
        raise ValueError(
            f"module {name!r} has {features(module)[1]} outputs, must have {width} to feed "
            f"{down!r}; register a family that fits the model"
        )


def is_computed(model: nn.Module, param: str) -> bool:
    """Whether the tensor ``param`` of ``model`` is made anew from others as its module runs."""
    owner, _, leaf = param.rpartition(".")
    return how_computed(model.get_submodule(owner), leaf) is not None


def check_parameters(model: nn.Module, params: Iterable[str], purpose: str) -> None:
    """Refuse weights that are computed from others: what is written to them is overwritten.

    Args:
        model: the model.
        params: names of tensors in it.
        purpose: what needs them, e.g. ``"to be pruned"``.

    Raises:
        ValueError: one is computed; it is named, with who does so and how to end it.
    """
    for param in dict.fromkeys(params):
        owner, _, leaf = param.rpartition(".")
        how = how_computed(model.get_submodule(owner), leaf)
        if how is not None:
            raise ValueError(
                f"{param!r} is no parameter: {how[0]} computes it anew whenever the module runs. "
                f"It must be one {purpose}: {how[1]} with module = model.get_submodule({owner!r})"
            )
