"""Embeddings, heads, and projections into attention heads of which only some rows train.

A row of an embedding is a token's vector, a row of a head what gives a token's logit; often both
are one parameter ("tied"). Its rows keep their order: a token's number must stay its row.

    storage row   0  1  2  3  4  5        rows 3, 4 and 5 train: one stretch, one parameter that
    trains                 x  x  x        aliases storage. Scattered rows are gathered.

With ids ``[tokens]`` and y = S[ids] ``[tokens, hidden]``, the gradient of trained row r is the sum
of dy over the tokens whose id is r. It is computed as torch does for a whole embedding, with ids
counted among the trained rows, so that nothing is as large as the vocabulary.

Some embeddings have a forward of their own around torch's. Gemma's returns
``super().forward(ids) * scale``, OPT's positions call ``super().forward(positions + 2)``. The
lookup above is put between such a class and ``nn.Embedding``, so that it is what ``super()`` finds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssah.compat.modules import is_transformed
from ssah.models import runs_own_forward
from ssah.training.entries import Entries
from ssah.training.splitting.given_out import GivenOut
from ssah.training.splitting.projection import MaskedProjection
from ssah.training.splitting.split_tensor import Part, SplitTensor, restored, width
from ssah.units import check_parameters

# Up to so many stretches of rows are parameters of their own, without a copy: the tokens that were
# added, or all but a few. Each is one more launch of every optimiser.
_STRETCHES = 8


class _Lookup(torch.autograd.Function):
    """y = S[ids], with gradients for the trained rows of S alone."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,  # int64 [...]
        storage: Tensor,  # [rows, hidden]
        parts: tuple[Part, ...],
        padding: int,  # the row that gets no gradient; -1: none
        by_frequency: bool,  # whether gradients are divided by how often a row is read
        *trained: Tensor,  # the slices: [trained, hidden] each
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.parts, ctx.padding, ctx.by_frequency = parts, padding, by_frequency
        ctx.dtypes = [each.dtype for each in trained]
        return F.embedding(ids, storage)  # [..., hidden]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        result: list[Tensor | None] = [None] * 5
        for i, part in enumerate(ctx.parts):
            if not ctx.needs_input_grad[5 + i]:
                result.append(None)
                continue
            n = width(part)
            # [...], from 0 to n: row n takes what belongs to no trained row, and is left out
            own = _among(ids, part, n)
            own = torch.where(ids == ctx.padding, n, own)
            value = torch.ops.aten.embedding_dense_backward(
                grads[0], own, n + 1, n, ctx.by_frequency
            )
            result.append(value[:n].to(ctx.dtypes[i]))
        return tuple(result)


def _among(ids: Tensor, part: Part, n: int) -> Tensor:
    """Which of the ``n`` rows of ``part`` each id is; ``n`` where it is none of them."""
    if isinstance(part, Tensor):
        place = torch.searchsorted(part, ids).clamp_(max=n - 1)
        return torch.where(part[place] == ids, place, n)
    return torch.where((ids >= part[0]) & (ids < part[1]), ids - part[0], n)


class MaskedRows(MaskedProjection):
    """A ``Linear`` of whose weight some rows train, and which may be tied to an embedding."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for leaf, split in self.split_tensors.items():
            # Tied weights must share memory there as well: by that transformers knows to write one.
            first = split.last_copy()
            if first is not None and any(value is first for value in destination.values()):
                destination[prefix + leaf] = first
            else:
                split.last_copy = weakref.ref(destination[prefix + leaf])


class RowLookup(nn.Embedding):
    """The lookup of an embedding of which some rows train, in the place of ``nn.Embedding``'s."""

    given_out: GivenOut
    lent: bool
    split_tensors: dict[str, SplitTensor]
    sync: Callable[[], None]

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of ``ids`` ``[...]``: ``[..., hidden]``."""
        y: Tensor
        split = self.split_tensors["weight"]
        self.given_out.check()
        if self.lent or is_transformed():
            # torch.func knows no function like the one below, and lent slices are not to be kept.
            y = F.embedding(
                ids,
                split.assembled(self),
                self.padding_idx,
                scale_grad_by_freq=self.scale_grad_by_freq,
            )
            return y
        self.sync()
        padding = -1 if self.padding_idx is None else int(self.padding_idx)
        y = _Lookup.apply(
            ids,
            split.storage,
            split.parts,
            padding,
            self.scale_grad_by_freq,
            *(self._parameters[name] for name in split.names),
        )
        return y


class MaskedEmbedding(MaskedRows):
    """An ``nn.Embedding`` of which some rows train, or a subclass that calls its forward."""

    _facts: WeightFacts | None = None  # while a forward of its own runs

    @classmethod
    def bases(cls, plain: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        """With the lookup of rows after ``plain``: its ``super().forward`` finds it."""
        return (cls, RowLookup) if plain is nn.Embedding else (cls, plain, RowLookup)

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """``[..., hidden]``: what the class that this is mixed into computes, with the lookup."""
        own = super(MaskedProjection, self).forward
        y: Tensor
        if self.plain is nn.Embedding:  # which reads no attribute of its weight
            y = own(*args, **options)
            return y
        storage = self.split_tensors["weight"].storage
        self._facts = WeightFacts(storage.dtype, storage.device, storage.shape)
        try:
            y = own(*args, **options)
        finally:
            self._facts = None  # and not deleted, which the compiler cannot follow
        return y

    def uninstall(self) -> None:
        """The ordinary embedding again, with the original parameter and the present values."""
        super().uninstall()
        vars(self).pop("_facts", None)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._facts is not None:
            return self._facts
        return super().__getattr__(name)


@dataclass(frozen=True)
class WeightFacts:
    """What a forward may read of a weight that is split: Gemma's takes its scale to the dtype."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the forward of this embedding reads weight.{name}; of an embedding of which only "
            "some rows train it may read dtype, device and shape, and call super().forward: name "
            "the whole parameter in extra_parameters= or keep="
        )


def split_rows(
    model: nn.Module, entries: Mapping[str, Entries], masked: dict[str, MaskedProjection]
) -> None:
    """Split every weight of which some rows train and that no unit owns, wherever it is tied.

    Args:
        model: the model.
        entries: parameter -> which of its entries train.
        masked: name -> the module, now masked; added to.
    """
    split = {f"{owner}.{leaf}" for owner, own in masked.items() for leaf in own.split_tensors}
    rows = [name for name, each in entries.items() if each.partial and name not in split]
    for name in rows:
        owner = name.rpartition(".")[0]
        if owner in masked:
            continue  # a bias, which was split with its weight
        owners = _owners(model, f"{owner}.weight")
        # With a bias of which rows train, as that of a projection into heads.
        leaves = ["weight", "bias"] if f"{owner}.bias" in rows else ["weight"]
        tensors: dict[str, SplitTensor] = {}
        with restored(tensors):
            for leaf in leaves:
                param = f"{owner}.{leaf}"
                original, each = model.get_parameter(param), entries[param]
                tensors[leaf] = SplitTensor.of(
                    leaf, original, each.dims, None, each.trains, stretches=_STRETCHES
                )
        slices: dict[str, nn.Parameter | None] = {}
        for owner in owners:
            module = model.get_submodule(owner)
            kind = MaskedEmbedding if isinstance(module, nn.Embedding) else MaskedRows
            masked[owner] = installed = kind.install(module, tensors)
            # One parameter under both names, as the weight was.
            slices = slices or {own: installed._parameters[own] for own in tensors["weight"].names}
            installed._parameters.update(slices)


def _owners(model: nn.Module, name: str) -> list[str]:
    """Names of the modules that have the parameter ``name``, in the order of the model."""
    wanted = model.get_parameter(name)
    every = model.named_parameters(remove_duplicate=False)
    return [other.rpartition(".")[0] for other, p in every if p is wanted]


def check_rows_split(model: nn.Module, name: str, argument: str) -> None:
    """Refuse a parameter whose rows cannot train apart; ``argument`` is what chose them.

    Raises:
        ValueError: it is not the weight of plain ``Linear`` and ``Embedding`` modules, or of an
            embedding whose own forward calls that of ``nn.Embedding``; nor the bias of one plain
            ``Linear`` that is not tied.
    """
    for owner in _owners(model, name):
        module, leaf = model.get_submodule(owner), name.rpartition(".")[2]
        check_parameters(model, [f"{owner}.{leaf}"], "for some of its rows to train")
        plain = type(module).forward is nn.Linear.forward or _looks_up(module)
        if leaf == "bias" and isinstance(module, nn.Linear):
            plain = plain and len(_owners(model, f"{owner}.weight")) == 1
        elif leaf != "weight":
            plain = False
        if not plain or not runs_own_forward(module):
            raise ValueError(
                f"{argument} has {name!r}, which is the {leaf} of {owner!r}, a "
                f"{type(module).__name__}; it must be the weight of a plain nn.Linear or "
                "nn.Embedding, or of an embedding whose forward calls super().forward, so that its "
                "rows can train apart"
            )
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
            raise ValueError(
                f"{argument} has {name!r}, and the embedding {owner!r} has "
                f"max_norm={module.max_norm}, sparse={module.sparse}; it must have neither: every "
                "forward pass would move rows, or gradients would be of another form"
            )


def _looks_up(module: nn.Module) -> bool:
    """Whether ``module`` is an embedding whose forward is, or goes through, ``nn.Embedding``'s."""
    forward = type(module).forward
    if not isinstance(module, nn.Embedding) or forward is nn.Embedding.forward:
        return isinstance(module, nn.Embedding)
    code = getattr(forward, "__code__", None)
    # super() without arguments needs the cell `__class__`, which a function has for nothing else.
    return code is not None and "__class__" in code.co_freevars and "forward" in code.co_names
