"""Modules of which single weights train, chosen one by one.

The values that train are one compact parameter ``[trained]``; the weight itself is a plain tensor,
into which they are written before the module runs. Example, of a weight [2, 3]:

    trains   x . .       storage        a b c      parameter   a e
             . x .                      d e f      gradient    those of a and e alone

Any module can be split so: its own forward runs, and finds in ``self.weight`` a tensor whose
gradient is taken at the trained places, and nowhere else. The gradient of the whole weight is there
for as long as one module's backward pass takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from ssah.compat.modules import is_transformed
from ssah.models import runs_own_forward
from ssah.training.entries import Entries
from ssah.training.splitting.masked_rows import MaskedRows
from ssah.training.splitting.projection import MaskedProjection
from ssah.training.splitting.split_tensor import SplitTensor, restored, unit_major
from ssah.units import check_parameters


class _Present(Function):
    """The whole weight, with gradients for its trained entries."""

    @staticmethod
    def forward(ctx: Any, split: SplitTensor, *trained: Tensor) -> Tensor:
        # Nothing of them is needed: a change of one before the backward pass must be noticed.
        ctx.save_for_backward(*trained)
        ctx.dims, ctx.parts = split.dims, split.parts
        return split.present(split.storage.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows = unit_major(grads[0], ctx.dims)  # [entries, ...]
        saved = zip(ctx.parts, ctx.saved_tensors, strict=True)
        return None, *(rows.index_select(0, part).to(own.dtype) for part, own in saved)


class MaskedWeights(MaskedRows):
    """A module of any kind, of whose parameters single weights train."""

    _whole: dict[str, Tensor] | None = None  # while its own forward runs

    def forward(self, *args: Any, **options: Any) -> Any:
        """What the class that this is mixed into computes."""
        self.given_out.check()
        if self.lent or is_transformed():
            # torch.func knows no function like the one above, and lent slices are not to be kept.
            whole = {name: s.present(s.assembled(self)) for name, s in self.split_tensors.items()}
        else:
            self.sync()
            whole = {
                name: _Present.apply(split, *(self._parameters[own] for own in split.names))
                for name, split in self.split_tensors.items()
            }
        self._whole = whole
        try:
            return super(MaskedProjection, self).forward(*args, **options)
        finally:
            self._whole = None  # and not deleted, which the compiler cannot follow

    def uninstall(self) -> None:
        """The ordinary module again, with the original parameters and the present values."""
        super().uninstall()
        vars(self).pop("_whole", None)

    def __getattr__(self, name: str) -> Any:
        if self._whole is not None and name in self._whole:
            return self._whole[name]
        return super().__getattr__(name)


def split_weights(
    model: nn.Module, entries: Mapping[str, Entries], masked: dict[str, MaskedProjection]
) -> None:
    """Split every module with a parameter of which single weights train, wherever it is tied.

    Other parameters of such a module that train in part are split with it.

    Args:
        model: the model.
        entries: parameter -> which of its entries train.
        masked: name -> the module, now masked; added to.
    """
    single = (name for name, each in entries.items() if each.single and each.partial)
    owners = {name.rpartition(".")[0] for name in single}
    tensors: dict[str, SplitTensor] = {}
    with restored(tensors):
        for name, each in entries.items():
            owner, _, leaf = name.rpartition(".")
            if owner in owners and each.partial:
                original = model.get_parameter(name)
                tensors[name] = SplitTensor.of(leaf, original, each.dims, None, each.trains)
        by_id = {id(split.original): split for split in tensors.values()}
        slices: dict[int, dict[str, nn.Parameter | None]] = {}
        for name, module in list(model.named_modules()):
            split = {leaf: by_id[id(p)] for leaf, p in module._parameters.items() if id(p) in by_id}
            if not split:
                continue
            masked[name] = installed = MaskedWeights.install(module, split)
            for tensor in split.values():
                # One parameter under both names, as a tied weight was.
                made = {own: installed._parameters[own] for own in tensor.names}
                installed._parameters.update(slices.setdefault(id(tensor), made))


def check_weights_split(model: nn.Module, name: str, argument: str) -> None:
    """Refuse a parameter of which single weights cannot train.

    Raises:
        ValueError: its module's forward was replaced, or it is computed from others.
    """
    wanted = model.get_parameter(name)
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is not wanted:
            continue
        owner, _, leaf = other.rpartition(".")
        check_parameters(model, [other], "for single weights of it to train")
        module = model.get_submodule(owner)
        if leaf != name.rpartition(".")[2] or not runs_own_forward(module):
            raise ValueError(
                f"{argument} has single weights of {name!r}, which {owner!r}, a "
                f"{type(module).__name__}, has as {leaf!r}; its forward must be that of its class, "
                "and tied parameters must have one name: load the model whole onto one device, "
                "without patches"
            )
