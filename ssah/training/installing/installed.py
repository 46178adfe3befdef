"""What a plan has changed in a model: made as a whole or not at all, read, and undone.

Of a model in one memory the projections are split (`ssah.training.splitting`). Of a model that
``fully_shard`` has sharded nothing is: its gradients are zeroed where nothing trains, and the
optimiser selects (`ssah.training.installing.sharded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.distributed import Ranks
from ssah.models import digests
from ssah.training.entries import Entries, TrainedSlice
from ssah.training.installing.forward_check import ForwardCheck
from ssah.training.installing.sharded import clear_frozen_gradients, frozen_pieces
from ssah.training.splitting import (
    MaskedProjection,
    SplitTensor,
    install_gated,
    split_model,
    split_rows,
    split_weights,
    uninstall_gated,
)
from ssah.units import DepthTwoModule


class Installed:
    """The change of one model.

    Args:
        model: the model.
        entries: parameter -> which of its entries train.
        fingerprint: of the plan.
        ranks: those that it is sharded over, or None.

    Attributes:
        sharded: whether nothing is split, since the model is sharded or is about to be.
        waiting: whether it is about to be, see `ssah.training.installing.following`.
        frozen: hashes of what is frozen, of this rank; see :meth:`digests`.
        dtypes: of every parameter, before the plan.
        averages: whether a trainer is to wrap the model in DistributedDataParallel.
        masked: name -> projection that is split.
        owners: names of all projections that units own something of.
        last_optimizer: a weak reference to the last one that stepped or was made for it.
        update_hooks: of the optimiser that updates in the backward pass, if there is one.
        unprepared_for: what the arguments of a trainer ask for that reads whole weights, until
            the trainer was prepared for it; or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        entries: Mapping[str, Entries],
        fingerprint: str,
        ranks: Ranks | None,
    ) -> None:
        self.model, self.entries = model, entries
        self.fingerprint, self.ranks = fingerprint, ranks
        self.sharded, self.waiting = ranks is not None, False
        self.frozen: dict[str, str] = {}
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self.last_optimizer: Callable[[], Any] | None = None
        self.unprepared_for: str | None = None
        self.averages = False
        self.masked: dict[str, MaskedProjection] = {}
        self._ffns: list[nn.Module] = []
        self._hooks: list[Any] = []
        self.update_hooks: list[Any] = []
        self._taken: dict[int, str] | None = None
        self._trained: dict[int, tuple[nn.Module, str, nn.Parameter]] | None = None
        self.owners: set[str] = set()
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}

    def install(self, modules: Mapping[str, DepthTwoModule], masks: Mapping[str, Tensor]) -> None:
        """Change the model.

        Args:
            modules: its depth-2 modules by B's name.
            masks: B's name -> bool ``[n_units]``, the units that train.
        """
        owned = (each for m in modules.values() for each in (*m.inputs, m.output))
        self.owners = {each.param.rpartition(".")[0] for each in owned}
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                # A gradient left over would let an optimiser move what is frozen.
                parameter.grad = None
                parameter.requires_grad_(self.entries[name].some)
            if not self.sharded:  # a slice of a DTensor would be none
                split_weights(self.model, self.entries, self.masked)
                split_model(self.model, modules, masks, self.entries, self.masked)
                split_rows(self.model, self.entries, self.masked)
                self._ffns = install_gated(self.model, modules)
                for module in self.masked.values():  # tied ones share slices: only now are all set
                    module.remember()
            self.frozen = self.digests()
            self.select()
        except BaseException:  # out of memory, for one: the model is as it was
            self.uninstall()
            for name, parameter in self.model.named_parameters():
                parameter.grad = gradients[name]
            raise

    def select(self, hooks: Iterable[Any] = ()) -> None:
        """Look at forward passes from now on and, where nothing is split, keep gradients of what is
        frozen zero, in place of the hooks before; ``hooks`` are further ones to remove one day."""
        self._remove_hooks()
        check = ForwardCheck(self)
        self._hooks = [*hooks, check.hang_on(self.model)]
        if self.sharded:
            self._hooks += clear_frozen_gradients(self.model, self.entries)
        self._taken = self._trained = None
        self.trained()  # now: later, something else may be in the place of a parameter

    def unsplit(self) -> None:
        """Every parameter whole again, under its own name, with the values of now."""
        for module in self.masked.values():
            module.sync()  # raises where its slices were taken away, before anything is changed
        uninstall_gated(self._ffns)
        for module in self.masked.values():
            module.uninstall()
        self.masked.clear()
        self._ffns = []

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def uninstall(self) -> None:
        """An ordinary model again, without gradients, with the values of now."""
        self.unsplit()
        self._remove_hooks()
        self.replace_update_hooks([])
        for name, parameter in self.model.named_parameters():
            if name in self._required_grad:  # what was added since (adapters, say) is left alone
                parameter.grad = None
                parameter.requires_grad_(self._required_grad[name])

    def split(self) -> dict[str, tuple[MaskedProjection, SplitTensor]]:
        """Original parameter -> its projection, and how it is stored, of all that is split."""
        return {
            f"{owner}.{leaf}": (module, tensor)
            for owner, module in self.masked.items()
            for leaf, tensor in module.split_tensors.items()
        }

    def slices(self) -> Iterator[TrainedSlice]:
        """What trains, in the order of the original parameters."""
        split = self.split()
        for name, entries in self.entries.items():
            if name in split:
                module, tensor = split[name]
                for own, index in zip(tensor.names, tensor.trained_pieces(), strict=True):
                    yield TrainedSlice(name, module.get_parameter(own), index, entries, split=True)
            elif entries.some:
                parameter = self.model.get_parameter(name)
                yield TrainedSlice(name, parameter, entries.index, entries, split=False)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train now, as in ``model.named_parameters()``; slices of what
        is split are ``[trained, ...]``."""
        every = self.model.named_parameters()
        return ((n, p) for n, p in every if n not in self.entries or self.entries[n].some)

    def replaced(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and original parameters of what is split, empty ``[0]``: no optimiser may hold
        them now."""
        return ((name, tensor.original) for name, (_, tensor) in self.split().items())

    def taken(self) -> dict[int, str]:
        """Id of an original parameter that is split -> its name: no optimiser may hold it now."""
        if self._taken is None:
            self._taken = {id(parameter): name for name, parameter in self.replaced()}
        return self._taken

    def trained(self) -> dict[int, tuple[nn.Module, str, nn.Parameter]]:
        """Id of a parameter of any shape that trains -> its module, its name there, and itself."""
        if self._trained is None:
            self._trained = {}
            for name, parameter in self.parameters():
                owner, _, leaf = name.rpartition(".")
                place = (self.model.get_submodule(owner), leaf, parameter)
                self._trained[id(parameter)] = place
        return self._trained

    def moved(self) -> set[int]:
        """Ids of the parameters that train and are no longer where they were."""
        places = self.trained().items()
        return {key for key, (at, leaf, own) in places if at._parameters.get(leaf) is not own}

    def replace_update_hooks(self, hooks: list[Any]) -> None:
        """Another optimiser updates in the backward pass now, with these hooks; or none."""
        for hook in self.update_hooks:
            hook.remove()
        self.update_hooks = hooks

    def forget(self) -> None:
        """What belongs to the model that this one was copied from."""
        self.last_optimizer = self._taken = self._trained = None
        self.replace_update_hooks([])

    def note_arguments(self, args: Any) -> None:
        """Which of a trainer's arguments asks for what `ssah.training.prepare_trainer` is for."""
        asked = (name for name in ("use_vllm", "sync_ref_model") if getattr(args, name, False))
        self.unprepared_for = next(asked, None)

    def own_slices(self) -> list[nn.Parameter]:
        """The trained slices of what is split, ``[trained, ...]`` each."""
        return [p for module in self.masked.values() for p in module.own.values()]

    def optimizer(self, given: Any) -> Any:
        """The optimiser ``given``, or the last that stepped under the plan; RuntimeError: none."""
        if given is None and self.last_optimizer is not None:
            given = self.last_optimizer()
        if given is None:
            raise RuntimeError("no optimiser has stepped under this plan; pass optimizer=")
        return getattr(given, "optimizer", given)  # Trainer's is wrapped by accelerate

    def n_trained(self) -> int:
        """How many elements train."""
        # Sharded, the parameter is all of the weight: of it the share of its entries trains.
        return sum(
            s.parameter.numel() * len(s.index) // len(s.entries.trains)
            if self.sharded
            else s.parameter.numel()
            for s in self.slices()
        )

    def originals(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, ``[...]`` as before the plan, by name; of what is split, a copy each."""
        split = self.split()
        for name in self.entries:
            if name in split:
                module, tensor = split[name]
                module.sync()
                yield name, tensor.read()
            else:
                yield name, self.model.get_parameter(name)

    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of the frozen entries of every parameter that has some; of this rank."""
        if self.sharded:
            return digests(frozen_pieces(self.model, self.entries))
        split = self.split()
        pieces: dict[str, Callable[[], Iterable[Tensor]]] = {}
        for name, entries in self.entries.items():
            if name in split and entries.partial:
                pieces[name] = split[name][1].frozen_rows
            elif (
                name in split and not entries.whole
            ):  # in the plan's order, though none of it trains
                pieces[name] = partial(_as_it_lies, split[name][1])
            elif not entries.whole:  # not split: none of it trains
                pieces[name] = partial(tuple, [self.model.get_parameter(name)])
        return digests(pieces)


def _as_it_lies(tensor: SplitTensor) -> tuple[Tensor]:
    """All of a tensor as the original lies, ``[out, in]`` of a weight: so an update has it too."""
    return (tensor.read(),)
