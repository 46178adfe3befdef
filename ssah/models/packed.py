"""Packed weights: which schemes are known, and how a weight is read back.

The only module that knows about quantisation. A scheme is told by the class of the projection or
of its weight; to add one, add a line to ``SCHEMES``, for example

    "their_package.PackedLinear": Scheme("theirs", "their_method", their_dequantise, "what to do"),

Models of it are then scored, ablated and hashed, and training them is refused. Nothing here imports
a package that packs: classes are told by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssah.compat import bitsandbytes, gguf


@dataclass(frozen=True)
class Scheme:
    """One way to pack the weight of a projection.

    Attributes:
        name: what people call it.
        method: ``quant_method`` in the configuration of a saved model.
        dequantise: the projection's weight as one plain floating-point tensor ``[out, in]``.
        instead: how to get a model with plain weights.
        identity: what tells one weight from another, where that is not all of ``dequantise``.
        differentiable: a block in which a module that may pass no gradient does.
    """

    name: str
    method: str
    dequantise: Callable[[Any], Tensor]
    instead: str
    identity: Callable[[Any], tuple[Tensor, ...]] | None = None
    differentiable: Callable[[Any], AbstractContextManager[None]] = nullcontext


def _torchao(module: Any) -> Tensor:
    weight = module.weight
    if type(weight).dequantize is Tensor.dequantize:  # that of torch's own quantised types
        raise ValueError(
            f"module has a weight of torchao's {type(weight).__name__}, which torchao cannot "
            "dequantise; must be a layout that it can (the plain ones of int8 and intx)"
        )
    plain: Tensor = weight.dequantize()
    return plain


_DEQUANTIZE = "model.dequantize(), or load the original weights"
# It takes one layout of weights for the other, and says nothing.
_DEQUANTIZE_FRESH = "model.dequantize() before it first runs, or load the original weights"
_UNPACK_GGUF = "load the file dequantised: GgufConfig(dequantize=True), or ssah without --packed"

_PACKED_GGUF = Scheme("packed GGUF", "gguf", gguf.weight_of, _UNPACK_GGUF)

# Class of a module or of its weight, qualified; subclasses count.
SCHEMES: dict[str, Scheme] = {
    "bitsandbytes.nn.modules.Linear8bitLt": Scheme(
        "bitsandbytes 8-bit", "bitsandbytes", bitsandbytes.weight_8bit, _DEQUANTIZE
    ),
    "bitsandbytes.nn.modules.Linear4bit": Scheme(
        "bitsandbytes 4-bit",
        "bitsandbytes",
        bitsandbytes.weight_4bit,
        _DEQUANTIZE_FRESH,
        bitsandbytes.identity_4bit,
        bitsandbytes.differentiable,
    ),
    "transformers.integrations.gguf.utils.GgufLinear": _PACKED_GGUF,
    "transformers.integrations.gguf.utils.GgufEmbedding": _PACKED_GGUF,
    "torchao.utils.TorchAOBaseTensor": Scheme(
        "torchao", "torchao", _torchao, "load the original weights"
    ),
}


def scheme_of(module: nn.Module) -> Scheme | None:
    """How the weight of ``module`` is packed; None where it is a plain one, or there is none."""
    # Some packages give the module a class of its own (bitsandbytes), some the weight (torchao).
    for kind in (*type(module).__mro__, *type(getattr(module, "weight", None)).__mro__):
        if (scheme := SCHEMES.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            return scheme
    return None


def packed_modules(model: nn.Module) -> dict[str, Scheme]:
    """Names of the modules of ``model`` whose weight is packed, and how."""
    found = ((name, scheme_of(module)) for name, module in model.named_modules())
    return {name: scheme for name, scheme in found if scheme is not None}


def dequantised(module: nn.Module) -> Tensor | None:
    """The weight of ``module`` unpacked, a copy ``[out, in]``; None where it is a plain one.

    Raises:
        ValueError: it is of a known scheme in a layout that cannot be unpacked.
    """
    scheme = scheme_of(module)
    if scheme is None:
        return None
    with torch.no_grad():
        return scheme.dequantise(module)


def identity(module: nn.Module) -> tuple[Tensor, ...] | None:
    """The tensors ``[...]`` that tell a packed weight from another; None where it is a plain one.

    It is the same in every layout of the weight, whether the module has run or not.

    Raises:
        ValueError: as of :func:`dequantised`.
    """
    scheme = scheme_of(module)
    if scheme is None:
        return None
    with torch.no_grad():
        return (scheme.dequantise(module),) if scheme.identity is None else scheme.identity(module)


def check_plain(model: nn.Module, purpose: str) -> None:
    """Refuse a model with packed weights.

    Args:
        model: the model.
        purpose: what needs plain ones, e.g. ``"to be trained"``.

    Raises:
        ValueError: it is quantised; the message has the scheme and what to do.
    """
    for name, scheme in packed_modules(model).items():
        raise ValueError(
            f"module {name!r} is quantised ({scheme.name}), must hold a plain floating-point "
            f"weight {purpose}: {scheme.instead}"
        )


@contextmanager
def passing_gradients(model: nn.Module) -> Iterator[None]:
    """Inside the block packed projections pass gradients to their inputs, or are refused.

    Raises:
        ValueError: its output needs no gradient although its input does: scores from gradients
            would be wrong in every layer before it.
    """

    def check(name: str, scheme: Scheme) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            # The first layers may be given what needs no gradient: that is no fault of theirs.
            if args[0].requires_grad and not out.requires_grad:
                raise ValueError(
                    f"module {name!r} ({scheme.name}) passes no gradient to its input on "
                    f"{args[0].device.type}: the metric must be 'variance' or 'norm' (a freshly "
                    "loaded model may pass one; a dequantised one does)"
                )

        return hook

    # What is laid out again must not be inference tensors.
    with torch.inference_mode(False), ExitStack() as stack:
        for name, scheme in packed_modules(model).items():
            module = model.get_submodule(name)
            stack.enter_context(scheme.differentiable(module))
            stack.callback(module.register_forward_hook(check(name, scheme)).remove)
        yield


def n_parameters(model: nn.Module) -> int:
    """How many weights ``model`` has, of packed ones those that they stand for."""
    # By identity, so that tied weights count once.
    meant = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for name in packed_modules(model):
        module: Any = model.get_submodule(name)
        if hasattr(module, "in_features"):
            meant[id(module.weight)] = module.in_features * module.out_features
        else:
            meant[id(module.weight)] = module.num_embeddings * module.embedding_dim
    return sum(meant.values())


def describe_packing(model: nn.Module) -> str | None:
    """The schemes of ``model``, of one without memory what its configuration says; None: plain."""
    names = sorted({scheme.name for scheme in packed_modules(model).values()})
    if names:
        return ", ".join(names)
    # A model on the meta device was made without its scheme: only the configuration tells.
    config: Any = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    method = config["quant_method"] if isinstance(config, dict) else config.quant_method
    method = str(getattr(method, "value", method))
    known = method in {scheme.method for scheme in SCHEMES.values()}
    return method if known else f"{method}, which must be dequantised to be scored"
