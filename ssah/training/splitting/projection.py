"""A projection while a plan is in force: its class is changed, its weight is split.

Example: a ``Linear`` of 8 units of which 2 train has the parameter ``weight_trained`` ``[2, in]``
in place of ``weight`` ``[8, in]``. Its ``state_dict`` has ``weight``, and takes one. It computes
what it did before, and is an ordinary ``Linear`` again, the same object, once the plan is closed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pickle import PicklingError
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn import functional as F

from ssah.compat.modules import is_transformed
from ssah.training.splitting.given_out import GivenOut
from ssah.training.splitting.masked_linear import MaskedLinearFunction
from ssah.training.splitting.split_tensor import SplitTensor, width


class SplitWeightError(AttributeError, RuntimeError):
    """The tensor is split up: reading it would give a copy, writing it would change nothing.

    An AttributeError, so that ``hasattr(module, "weight")`` is an answer and not an error.
    """


def pickling_error() -> PicklingError:
    """The error of pickling what belongs to a plan: a slice would no longer alias its weight."""
    return PicklingError(
        "the model is under a plan, and cannot be pickled (torch.save of a whole model): save its "
        "weights (model.save_pretrained, model.state_dict()) or what was trained "
        "(plan.save_pretrained), or close the plan first (plan.close())"
    )


def replaced_slices(module: nn.Module) -> RuntimeError:
    """The error of a projection whose trained slices others have taken away."""
    return RuntimeError(
        f"the trained slices of this {type(module).__name__} were replaced by other parameters "
        "after the plan was made (fully_shard, FSDP, DeepSpeed and offloading do that, and so do "
        "Trainer and accelerate with them): shard the model first, and make the plan then; or let "
        "Trainer or accelerate shard it with FSDP2, and give them the plan's own optimiser; FSDP1 "
        "and DeepSpeed's ZeRO are not supported, and a model under a plan cannot be offloaded"
    )


def _in_order(register: Callable[..., Any]) -> Callable[..., Any]:
    """``register``, a method of ``nn.Module``; refused among channels that the plan has moved."""

    @functools.wraps(register)
    def checked(self: MaskedProjection, *args: Any, **options: Any) -> Any:
        self.check_order()
        return register(self, *args, **options)

    return checked


# One class for all modules of a kind, so that the compiler need not look at each anew.
@functools.cache
def _mixed(mixin: type[MaskedProjection], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a ``plain`` module while it is split: a MaskedLinear, for one."""
    return type(f"Masked{plain.__name__}", mixin.bases(plain), {})


class MaskedProjection(nn.Module):
    """A projection while a plan is active: an ``nn.Linear`` or ``Conv1D`` whose class was changed.

    The module stays the same object, so that whoever holds it goes on holding it. Only what it is
    made of changes: in its parameters ``weight`` gives way to ``weight_trained``.

    Attributes:
        split_tensors: ``"weight"``, ``"bias"`` -> how it is split; other tensors stay parameters.
        is_output: whether units are the columns (B) rather than the rows (A) of the weight.
        moves_channels: whether the channels beside it lie in the order of its storage, as between A
            and B of an FFN.
        order: names of the original parameters, in their order.
        plain: the class that the module had.
        own: the trained slices by their names, as they were made.
        given_out: the copies that ``state_dict`` gave away.
    """

    is_split = True  # rooms below this one know a split projection by it
    split_tensors: dict[str, SplitTensor]
    is_output: bool
    moves_channels: bool
    order: tuple[str, ...]
    plain: type[nn.Module]
    own: dict[str, nn.Parameter]
    given_out: GivenOut

    @classmethod
    def bases(cls, plain: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        """What the class of a ``plain`` module is made of while it is split."""
        return (cls, plain)

    @classmethod
    def install(
        cls,
        module: nn.Module,
        split: dict[str, SplitTensor],
        *,
        is_output: bool = False,
        moves_channels: bool = False,
    ) -> MaskedProjection:
        """Mix this class into that of ``module``, in place."""
        module.order = tuple(module._parameters)  # type: ignore[assignment]
        module.split_tensors = split  # type: ignore[assignment]
        module.is_output = is_output  # type: ignore[assignment]
        module.moves_channels = moves_channels  # type: ignore[assignment]
        module.plain = type(module)  # type: ignore[assignment]
        own: dict[str, nn.Parameter | None] = {}
        for name, parameter in module._parameters.items():
            own.update(split[name].parameters() if name in split else {name: parameter})
        # Last, once there is memory for the slices: a module is changed as a whole or not at all.
        module.__class__ = _mixed(cls, type(module))  # type: ignore[arg-type]
        module._parameters = own
        module.given_out = GivenOut()  # type: ignore[assignment]
        assert isinstance(module, MaskedProjection)
        module.remember()
        return module

    def remember(self) -> None:
        """The slices that it has now are its own."""
        names = (name for split in self.split_tensors.values() for name in split.names)
        self.own = {name: self._parameters[name] for name in names}  # type: ignore[misc]

    def uninstall(self) -> None:
        """The ordinary module again, with the original parameters and the present values."""
        self.sync()
        own = {name: p for name, p in self._parameters.items() if name in self.order}
        own.update((name, split.restore()) for name, split in self.split_tensors.items())
        self._parameters = {name: own[name] for name in self.order}
        plain = self.plain
        del self.split_tensors, self.is_output, self.moves_channels
        del self.order, self.plain, self.own, self.given_out
        self.__class__ = plain  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """The projection of ``x`` ``[..., in]``: ``[..., out]``."""
        weight, bias = self.split_tensors["weight"], self.split_tensors.get("bias")
        self.given_out.check()
        if self.lent or is_transformed():
            # torch.func knows no function like the one below, and lent slices are not to be kept.
            matrix = weight.assembled(self)  # [entries, ...]
            if weight.places is not None and not self.moves_channels:
                matrix = matrix.index_select(0, weight.places)
            b = self._parameters.get("bias") if bias is None else bias.assembled(self)
            return F.linear(x, matrix.t() if self.is_output else matrix, b)
        self.sync()
        names = (name for split in self.split_tensors.values() for name in split.names)
        y: Tensor = MaskedLinearFunction.apply(
            x,
            weight.storage,
            self._parameters.get("bias") if bias is None else bias.storage,
            self.is_output,
            weight.parts,
            () if bias is None else bias.parts,
            *((None, None) if self.moves_channels else (weight.order, weight.places)),
            *(self._parameters[name] for name in names),
        )
        return y

    @property
    def lent(self) -> bool:
        """Whether its slices are others than its own now, as inside ``functional_call``."""
        return any(self._parameters.get(name) is not own for name, own in self.own.items())

    def __getattr__(self, name: str) -> Any:
        split = vars(self).get("split_tensors")
        if split is not None and name in split:
            raise SplitWeightError(
                f"the {name} of this {type(self).__name__} is split into trained and frozen units "
                "by an active plan: close it first (plan.close()), or read model.state_dict()"
            )
        return super().__getattr__(name)

    def check_order(self) -> None:
        """Raise RuntimeError where a hook among the channels would take one for another."""
        if self.moves_channels:
            raise RuntimeError(
                f"a hook hangs on this {type(self).__name__} or on the activation beside it, whose "
                "channels a plan has put into another order: register it before the plan is made, "
                "so that they stay where they are, or after plan.close()"
            )

    register_forward_pre_hook = _in_order(nn.Module.register_forward_pre_hook)
    register_forward_hook = _in_order(nn.Module.register_forward_hook)
    register_full_backward_pre_hook = _in_order(nn.Module.register_full_backward_pre_hook)
    register_full_backward_hook = _in_order(nn.Module.register_full_backward_hook)

    def _replicate_for_data_parallel(self) -> MaskedProjection:
        raise RuntimeError(
            "the model is under a plan, whose trained slices torch.nn.DataParallel cannot copy: "
            "let one GPU be visible (CUDA_VISIBLE_DEVICES=0), or run one process a GPU (torchrun)"
        )

    def sync(self) -> None:
        """Bring trained values that are held apart into what the forward pass uses.

        Raises:
            RuntimeError: a slice was replaced by another one.
        """
        if self.lent:
            raise replaced_slices(self)
        for split in self.split_tensors.values():
            split.sync(self)

    def extra_repr(self) -> str:
        """Shapes of what is split."""
        return ", ".join(
            f"{name}: {sum(map(width, split.parts))} of {len(split.storage)} train"
            for name, split in self.split_tensors.items()
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def originals(self) -> dict[str, nn.Parameter | None]:
        """The parameters as the ordinary module would have them, ``[out, in]`` and ``[out]``.

        Copies in host memory where one is split: on a device, those of all modules would be a
        second model.
        """
        self.sync()
        originals = dict(self._parameters)
        for name, split in self.split_tensors.items():
            originals[name] = nn.Parameter(split.read().cpu(), requires_grad=False)
        return {name: originals[name] for name in self.order}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # A state dict has the names and shapes of the model as it was: files fit any model.
        own, self._parameters = self._parameters, self.originals()
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters = own
        self.given_out.add(
            {prefix + name: destination[prefix + name] for name in self.split_tensors}
        )

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        own, self._parameters = self._parameters, self.originals()
        self.given_out = GivenOut()  # what was written to comes back: nothing is lost
        # Assigning would part the parameters from their storage: always copy.
        metadata = {**local_metadata, "assign_to_params_buffers": False}
        try:
            super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        finally:
            loaded, self._parameters = self._parameters, own
            for name, split in self.split_tensors.items():
                split.write(loaded[name], self)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedProjection:
        self.sync()
        for split in self.split_tensors.values():
            split.swapped = True  # until they are views again, below
        super()._apply(fn, recurse)
        self.remember()
        for split in self.split_tensors.values():
            split.convert(fn, self)
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise pickling_error()

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedProjection:
        self.sync()
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new.given_out = GivenOut()  # of the model that was copied
        # Copied apart, slices and storage are two tensors: here too they must be one.
        for split in new.split_tensors.values():
            split.alias(new)
        return new
