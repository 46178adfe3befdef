"""Which weights are scored one by one: the matrices of the projections in a model's layers.

A matrix W of ``[out, in]`` computes y = W x. Some parameters lie the other way around, and those of
routed experts have one matrix an expert. Of an output width of 6 and an input width of 2:

    nn.Linear              [6, 2]       row 4 is output 4
    Conv1D of GPT-2        [2, 6]       column 4 is output 4                transposed
    4 experts of Mixtral   [4, 6, 2]    row 4 of a matrix is output 4
    4 experts of GPT-OSS   [4, 2, 6]    column 4 of a matrix is output 4    transposed
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ssah.models import at_hand, dequantised, scheme_of
from ssah.units import (
    DOWN,
    RoutedExperts,
    check_unsplit,
    features,
    find_modules,
    layers_path,
    projection,
)


@dataclass(frozen=True, eq=False)
class Matrix:
    """One parameter whose weights are scored.

    Attributes:
        param: its name in the model.
        owner: the module that has it.
        shape: ``[out, in]``, of experts ``[experts, out, in]``; see the head of this file.
        transposed: whether the last two dimensions are ``[in, out]``.
        routed: of experts, all those of the layer.
    """

    param: str
    owner: nn.Module
    shape: tuple[int, ...]
    transposed: bool
    routed: RoutedExperts | None = None

    @property
    def n_inputs(self) -> int:
        """The input width."""
        return self.shape[-2 if self.transposed else -1]

    def magnitudes(self) -> Tensor:
        """|W|, float32 ``[*shape]``: a copy, where the weight is; a packed one is unpacked."""
        with at_hand(self.owner):
            plain = dequantised(self.owner)
            if plain is None:
                plain = getattr(self.owner, self.param.rpartition(".")[2]).detach()
            return plain.abs().float()


def find_matrices(
    model: PreTrainedModel, parameters: str | Iterable[str] = "*"
) -> dict[str, Matrix]:
    """The matrices in the decoder's layers by name of the parameter, in the order of the model.

    Embeddings, the vocabulary projection, norms, biases and the routers of mixtures are none.

    Args:
        model: of a known family.
        parameters: patterns of names, as of a shell: ``"*.mlp.*"``. One that matches is enough.

    Raises:
        ValueError: a pattern matches none; a projection computes something else than its weight
            says, or a plan has split it.
    """
    found = _all_matrices(model)
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    for pattern in patterns:
        if not any(fnmatchcase(param, pattern) for param in found):
            raise ValueError(
                f"parameters has {pattern!r}, which matches none of the {len(found)} matrices in "
                f"the layers; they have names like {next(iter(found), None)!r}"
            )
    if not patterns:
        raise ValueError("parameters is empty; it must have at least one pattern, '*' for all")
    return {
        param: matrix
        for param, matrix in found.items()
        if any(fnmatchcase(param, pattern) for pattern in patterns)
    }


def _all_matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    found: dict[str, Matrix] = {}
    experts = {m.down: m.routed for m in find_modules(model).values() if m.routed is not None}
    # Where a mixture of experts is -> how many it has.
    mixtures = {
        f"{name.rpartition('.')[0]}.": experts[module].n_experts
        for name, module in model.named_modules()
        if module in experts
    }
    start = f"{layers_path(model)}."
    for name, module in model.named_modules():
        if not name.startswith(start):
            continue
        check_unsplit(name, module)
        if (routed := experts.get(module)) is not None:
            for leaf in (routed.up, DOWN):
                param, shape = f"{name}.{leaf}", tuple(getattr(module, leaf).shape)
                turned = bool(module.is_transposed)
                found[param] = Matrix(param, module, shape, turned, routed)
        elif isinstance(module, nn.Linear | Conv1D) or scheme_of(module) is not None:
            inputs, outputs = features(module)
            # A router has an output for each expert, and often more to compute than a product.
            if any(name.startswith(at) and outputs == n for at, n in mixtures.items()):
                continue
            projection(model, name)  # refused if it computes something else
            turned = isinstance(module, Conv1D)
            shape = (inputs, outputs) if turned else (outputs, inputs)
            found[f"{name}.weight"] = Matrix(f"{name}.weight", module, shape, turned)
    return found
