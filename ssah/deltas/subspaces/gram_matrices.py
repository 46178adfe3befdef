"""The Gram matrix of what enters a projection: G = sum over tokens of x x^T, in one pass.

With x the input ``[in]`` at a token that counts, G is ``[in, in]``, and what the projection puts
out has W G W^T. Example: over the inputs (1, 0) and (1, 2) it is [[2, 2], [2, 4]].

Products are taken in the precision of the model, in float32 at least, for a batch at a time, and
added up in float64. Q, K and V get one tensor, and so do gate and up: theirs is computed once.

Each of several ranks sums over batches of its own. In the end the matrices are gathered a few rows
at a time, and every rank adds them up in the order of the ranks, so that all hold the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssah.attribution import TOKENS, Batch, BatchReader, counted_tokens
from ssah.choices import check_choice
from ssah.distributed import Group, Ranks, check_not_sharded
from ssah.models import as_it_was, cheap_weights_hash, check_backbone, check_whole
from ssah.units import config_hash, features, layers_path

_GATHERED_AT_ONCE = 2**22  # elements of a matrix: 32 MiB a rank


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
    process_group: Group = "auto",
) -> dict[str, Gram]:
    """The Gram matrices of what enters projections of a model.

    Args:
        model: a transformers model; it is left as it was.
        loader: batches, as of `ssah.attribute`.
        projections: names of ``nn.Linear`` or ``Conv1D`` modules; by default all in the decoder's
            layers. Matrices of one tensor are one object. Experts that are kept in one 3-D
            parameter are no modules, and are not among them.
        tokens: which positions count, as of `ssah.attribute`; padding never does.
        process_group: as of `ssah.attribute`: ranks with batches of their own
            (:func:`ssah.distributed.deal`), some or none, all get the matrices of all batches.

    Returns:
        Name of a projection -> its matrix.

    Raises, on every rank if on one:
        ValueError: a name that is no such module, or of one that does not run; no token counts; a
            sharded model; ranks that differ, or that were all given the same batches.
        TypeError: ``model`` is not a transformers model, or wraps one.
        FloatingPointError: an input is NaN or infinite.

    Source: Wei et al. 2024, arXiv 2402.05162 (ActSVD takes its directions from W X).
    """
    ranks = Ranks.of(process_group)
    with ranks.agreeing():
        check_choice("tokens", tokens, TOKENS)
        whole = check_whole(model)
        check_not_sharded(whole)
        check_backbone(whole)
        sums = _Sums(check_projections(whole, projections))
        batches = iter(loader)
        # The first batch says what "auto" means.
        begun = list(islice(batches, 1))
        if tokens == "auto" and begun:
            tokens = counted_tokens(begun[0])
        # For the comparison alone: it costs a pass over the weights.
        hashed = cheap_weights_hash(whole) if ranks.size > 1 else None
    ranks.common(
        tokens=None if tokens == "auto" else tokens,  # of a rank without a batch
        projections=list(sums.modules),
        config_hash=config_hash(whole),
        weights_hash=hashed,
    )
    with ranks.agreeing(), as_it_was(whole), ExitStack() as stack:
        reader = BatchReader(whole, tokens=tokens)
        for name, module in sums.modules.items():
            stack.callback(module.register_forward_pre_hook(sums.hook(name)).remove)
        for number, raw in enumerate(chain(begun, batches)):
            batch = reader.read(raw, number)
            sums.begin(batch)
            with torch.inference_mode():  # the backbone alone: no layer needs the head
                whole.base_model(**batch.inputs, use_cache=False)
    return sums.joined(ranks)


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
            _agree(self._owner, name, owner)
            if not same:
                self._last = (x, name)
                self._add(name, x)

        return read

    @torch.inference_mode(False)  # matrices are added to after the pass, and are the user's
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

    def joined(self, ranks: Ranks) -> dict[str, Gram]:
        """The matrices over all ranks, the same bits on each."""
        told = ranks.tell([self._count, self._owner])
        counts = [count for count, _ in told]
        if sum(counts) == 0:
            raise ValueError("loader has no token that counts; it must have at least one")
        owner: dict[str, str] = {}
        for _, of_rank in told:
            for name, own in of_rank.items():
                _agree(owner, name, own)
        silent = [name for name in self.modules if name not in owner]
        if silent:
            raise ValueError(f"the module {silent[0]!r} did not run: nothing has entered it")
        same = counts.count(counts[0]) == len(counts)
        grams = {}
        for name in dict.fromkeys(owner[name] for name in self.modules):
            matrix, alike = self._over(ranks, name)
            grams[name] = Gram(matrix, sum(counts))
            same = same and alike
        ranks.check_dealt(same)
        return {name: grams[owner[name]] for name in self.modules}

    def _over(self, ranks: Ranks, name: str) -> tuple[Tensor, bool]:
        """The matrix of all ranks together, ``[in, in]``, and whether theirs are all the same."""
        matrix = self._matrices.get(name)
        if matrix is None:  # of a rank without a batch
            n = features(self.modules[name])[0]
            matrix = torch.zeros(n, n, dtype=torch.float64)
        if ranks.size == 1:
            return matrix, False
        alike = True
        for rows in matrix.split(max(1, _GATHERED_AT_ONCE // len(matrix))):  # [n, in], views
            parts = ranks.gather(rows)  # [ranks, n, in]
            alike = alike and bool((parts == parts[0]).all())
            rows.copy_(sum(parts))
        return matrix, alike


def _agree(owner: dict[str, str], name: str, own: str) -> None:
    """Who shares a matrix must go on to share the tensor."""
    if owner.setdefault(name, own) != own:
        raise ValueError(
            f"what enters {name!r} is shared with another projection in some batches and not in "
            "others; ask for its matrix alone: projections=[...]"
        )


def check_projections(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Module]:
    """The projections that are meant, in the order of the model; None: all in its layers.

    Raises:
        ValueError: a name is of none.
    """
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
