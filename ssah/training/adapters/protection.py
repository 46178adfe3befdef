"""LoRA that leaves chosen units as they are: ``protect_adapter``.

An adapter adds a product to a projection, W + s B A, with B ``[out, r]`` and A ``[r, in]``. Row i
of B writes row i of W and nothing else; column j of A writes column j and nothing else. So a unit
keeps what it owns if the rows of B (of the projections into it) and the columns of A (of the
projection out of it) are zero, and stay zero. They are set to zero once. That changes nothing, as
B of a fresh adapter is zero. From then on their gradients are set to zero, so that no optimiser
moves them: momentum stays zero, and decay shrinks a zero to a zero.

Example: unit 3 of an FFN with projections of ``[64, 32]`` and ``[32, 64]``, and adapters of rank 8.
Zero are row 3 of gate's and up's B ``[64, 8]`` and column 3 of down's A ``[8, 64]``. Merged, row 3
of gate and up and column 3 of down are what they were, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ssah.compat import peft
from ssah.selections import Selection
from ssah.training.adapters.entries import (
    Part,
    changes,
    frozen_entries,
    inner_of,
    tensors,
    touched,
)
from ssah.training.entries import Entries
from ssah.training.installing import listed
from ssah.units import UnitSet


class ProtectedAdapter:
    """What `protect_adapter` has done, and can prove or undo."""

    def __init__(
        self, parts: list[Part], stilled: list[tuple[str, nn.Module, str, Entries]]
    ) -> None:
        """Clear the parts and keep them so; ``stilled`` has parameter, layer, adapter and entries
        of each adapter that stands still as a whole."""
        self._parts, self._stilled = parts, stilled
        for part in parts:
            part.clear()
        self._hooks = [part.tensor.register_hook(part.mask) for part in parts]
        own = [p for _, layer, adapter, _ in stilled for p in tensors(layer, adapter)]
        self._unmoved = [parameter for parameter in own if parameter.requires_grad]
        for parameter in self._unmoved:
            parameter.requires_grad_(False)

    @property
    def parts(self) -> int:
        """How many tensors of the adapters have entries that stay zero."""
        return len(self._parts)

    def verify(self) -> None:
        """Check that the adapters still write nothing that a protected unit owns.

        Raises:
            RuntimeError: an entry is not zero (an adapter was loaded or written to); it is named.
        """
        moved = [part.name for part in self._parts if part.written()]
        moved += [n for n, layer, adapter, e in self._stilled if changes(layer, adapter, e)]
        if moved:
            raise RuntimeError(
                f"the adapter of {listed(moved)} writes entries of protected units: somebody has "
                "loaded or changed it since protect_adapter"
            )

    def remove(self) -> None:
        """From now on everything in the adapters trains again."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._unmoved:
            parameter.requires_grad_(True)
        self._hooks, self._unmoved = [], []


def protect_adapter(
    model: nn.Module, units: UnitSet | Selection, *, only: bool = False
) -> ProtectedAdapter:
    """Keep the active LoRA adapters of ``model`` from changing what ``units`` own.

    Call it after ``get_peft_model``, or after a trainer of TRL was made with ``peft_config=``, and
    before training. Saved adapters load without this library.

    Example::

        model = peft.get_peft_model(model, LoraConfig(target_modules="all-linear"))
        protected = ssah.protect_adapter(model, groups["scu"])
        ...                      # train as ever
        protected.verify()

    Args:
        model: a ``PeftModel`` over a causal language model. LoRA (rsLoRA, on a packed base too, of
            routed experts too) and MiSS, the latter on projections into units alone.
        units: what stays: units, or a selection (`ssah.select`). Of units, with shared key/value
            heads, a row of V stays if any column of O that it feeds does.
        only: the reverse: the adapters change what ``units`` own and nothing else. Adapters of
            other modules are switched off (``requires_grad=False``).

    Returns:
        A handle that can `verify` and `remove` the protection.

    Raises:
        TypeError: ``model`` is no ``PeftModel``.
        ValueError: units of another model; an adapter that couples units (DoRA), whose change of a
            protected unit is not zero already, that is merged, sharded, or of another kind; a
            module in ``modules_to_save`` that holds protected units. It is named.

    Source: LoRA, Hu et al., arXiv 2106.09685 (the product); the rest follows from it.
    """
    inner = inner_of(model)
    trains = frozen_entries(inner, units, only=only)
    active = peft.active_adapters(model)
    for name, wrapper in peft.saved_whole(inner).items():
        _check_saved(name, wrapper, trains, active, only=only)
    parts: list[Part] = []
    stilled: list[tuple[str, nn.Module, str, Entries]] = []
    for param, layer, adapter, part, entries in touched(model, trains, only=only):
        if changes(layer, adapter, entries):
            raise ValueError(
                f"the adapter {adapter!r} of {param!r} changes protected units already (it was "
                "trained without protection, or starts from init_lora_weights such as 'pissa'): "
                "start with a fresh adapter, init_lora_weights=True"
            )
        if part is not None:
            parts.append(part)
        else:
            # Where nothing of a projection trains, its adapter stands still as a whole.
            stilled.append((param, layer, adapter, entries))
    # Nothing was changed until here, so that a refusal leaves the model as it was.
    return ProtectedAdapter(parts, stilled)


def _check_saved(
    name: str,
    wrapper: nn.Module,
    trains: Mapping[str, Entries],
    active: tuple[str, ...],
    *,
    only: bool,
) -> None:
    """Refuse a module that trains whole although protected units own some of it."""
    saved: Any = wrapper.modules_to_save
    if not any(adapter in saved for adapter in active):
        return
    held = [param for param in trains if param.startswith(f"{name}.")]
    kept = [param for param in held if not trains[param].whole]
    if kept or (only and not held):
        raise ValueError(
            f"modules_to_save has {name!r}, which trains whole, but "
            f"{kept[0] if kept else name!r} must stay: take it out of modules_to_save"
        )
