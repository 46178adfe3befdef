"""The Gram matrix of what enters a projection: G = sum over tokens of x x^T, in one pass.

With x the input ``[in]`` at a token that counts, G is ``[in, in]``, and what the projection puts
out has W G W^T. Example: over the inputs (1, 0) and (1, 2) it is [[2, 2], [2, 4]].

Products are taken in the precision of the model, in float32 at least, for a batch at a time, and
added up in float64. Q, K and V get one tensor, and so do gate and up: theirs is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ssah.attribution import TOKENS, Batch, BatchReader, counted_tokens
from ssah.choices import check_choice
from ssah.models import as_it_was, check_backbone, check_whole
from ssah.units import layers_path


@dataclass(frozen=True, eq=False)
class Gram:
    """The second moment of what enters a projection, not centred.

    Attributes:
        matrix: sum of x x^T, float64 ``[in, in]`` on the CPU.
        tokens: over how many.
    """

    matrix: Tensor
    tokens: int


def gram(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    projections: Iterable[str] | None = None,
    *,
    tokens: str = "auto",
) -> dict[str, Gram]:
    """The Gram matrices of what enters projections of a model.

    Args:
        model: a transformers model; it is left as it was.
        loader: batches, as of `ssah.attribute`.
        projections: names of ``nn.Linear`` or ``Conv1D`` modules; by default all in the decoder's
            layers. Matrices of one tensor are one object. Experts that are kept in one 3-D
            parameter are no modules, and are not among them.
        tokens: which positions count, as of `ssah.attribute`; padding never does.

    Returns:
        Name of a projection -> its matrix.

    Raises:
        ValueError: a name that is no such module, or of one that does not run; no token counts.
        TypeError: ``model`` is not a transformers model, or wraps one.
        FloatingPointError: an input is NaN or infinite.

    Source: Wei et al. 2024, arXiv 2402.05162 (ActSVD takes its directions from W X).
    """
    check_choice("tokens", tokens, TOKENS)
    whole = check_whole(model)
    check_backbone(whole)
    sums = _Sums(_modules(whole, projections))
    batches = iter(loader)
    # The first batch says what "auto" means.
    begun = list(islice(batches, 1))
    if tokens == "auto" and begun:
        tokens = counted_tokens(begun[0])
    reader = BatchReader(whole, tokens=tokens)
    with as_it_was(whole), ExitStack() as stack:
        for name, module in sums.modules.items():
            stack.callback(module.register_forward_pre_hook(sums.hook(name)).remove)
        for number, raw in enumerate(chain(begun, batches)):
            batch = reader.read(raw, number)
            sums.begin(batch)
            with torch.inference_mode():  # the backbone alone: no layer needs the head
                whole.base_model(**batch.inputs, use_cache=False)
    return sums.found()


class _Sums:
    """Matrices of the projections, as batches pass through them."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self._mask: Tensor  # bool [rows, length], of the batch that runs
        self._count = 0
        self._matrices: dict[str, Tensor] = {}  # by the projection that has the tensor first
        self._owner: dict[str, str] = {}  # projection -> the one whose matrix is its own
        self._last: tuple[Tensor | None, str] = (None, "")

    def begin(self, batch: Batch) -> None:
        """The batch runs next."""
        self._mask, self._last = batch.token_mask, (None, "")
        self._count += int(batch.token_mask.sum())

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Reads what enters the projection ``name``, ``[..., in]``."""

        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            same = self._last[0] is x
            owner = self._last[1] if same else name
            # Who shares a matrix must go on to share the tensor.
            if self._owner.setdefault(name, owner) != owner:
                raise ValueError(
                    f"what enters {name!r} is shared with another projection in some batches and "
                    "not in others; ask for its matrix alone: projections=[...]"
                )
            if not same:
                self._last = (x, name)
                self._add(name, x)

        return read

    def _add(self, name: str, x: Tensor) -> None:
        mask = self._mask.to(x.device).reshape(x.shape[:-1])
        counted = x[mask]  # [tokens, in]
        if counted.dtype not in (torch.float32, torch.float64):
            counted = counted.float()
        product = (counted.T @ counted).double().cpu()
        if not bool(product.diagonal().sum().isfinite()):
            raise FloatingPointError(f"what enters {name!r} is NaN or infinite")
        if name in self._matrices:
            self._matrices[name] += product
        else:
            self._matrices[name] = product

    def found(self) -> dict[str, Gram]:
        if self._count == 0:
            raise ValueError("loader has no token that counts; it must have at least one")
        silent = [name for name in self.modules if name not in self._owner]
        if silent:
            raise ValueError(f"the module {silent[0]!r} did not run: nothing has entered it")
        grams = {name: Gram(matrix, self._count) for name, matrix in self._matrices.items()}
        return {name: grams[self._owner[name]] for name in self.modules}


def _modules(model: PreTrainedModel, names: Iterable[str] | None) -> dict[str, nn.Module]:
    """The projections that are meant, in the order of the model."""
    known = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if names is None:
        start = f"{layers_path(model)}."
        return {name: module for name, module in known.items() if name.startswith(start)}
    wanted = [names] if isinstance(names, str) else list(names)
    wrong = [name for name in wanted if name not in known]
    if wrong or not wanted:
        raise ValueError(
            f"projections has {wrong or wanted!r}; it must have names of nn.Linear or Conv1D "
            f"modules, {next(iter(known))!r} for one"
        )
    return {name: known[name] for name in known if name in wanted}
