"""Whether what is frozen still computes what it did: hashes of weights alone do not tell.

An adapter on a frozen query projection leaves the weight as it is, and adds to what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ssah.compat import peft
from ssah.training.installing.installed import Installed
from ssah.training.splitting import replaced_slices


def check_in_place(installed: Installed) -> None:
    """Refuse frozen entries that are elsewhere, or whose module computes something more.

    Of modules that train whole nothing is said: their adapters and patches change nothing frozen.
    A new forward of an FFN or a norm (fused kernels are put there so) calls the same weights.

    Raises:
        RuntimeError: the module or parameter is named.
    """
    split = installed.split()
    projections = {name.rpartition(".")[0] for name in split} | installed.owners
    modules = dict(installed.model.named_modules(remove_duplicate=False))
    for name, entries in installed.entries.items():
        if entries.whole:
            continue
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        adapters = None if module is None else peft.adapters_on(module)
        if adapters:
            raise RuntimeError(
                f"module {owner!r} has frozen entries, and the adapter {adapters[0]!r} that was "
                "added since adds to what they compute: take it off (model.unload()), or leave "
                "this module out of target_modules"
            )
        if name in split:
            own = split[name][0]
            if module is own and own.lent:
                raise replaced_slices(own)
            there = module is own
        else:
            there = module is not None and (leaf in module._parameters or adapters is not None)
        if not there:
            raise RuntimeError(
                f"parameter {name!r}, which has frozen entries, is no longer where it was: a "
                "module was replaced or renamed after the plan was made. Put it back, or make the "
                "plan afterwards"
            )
        if owner in projections and module is not None and "forward" in vars(module):
            raise RuntimeError(
                f"the forward of {owner!r}, which has frozen entries, was replaced after the plan "
                "was made: nobody knows what it computes with them. Replace it before the plan"
            )


def check_unmoved(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse frozen entries that have other bits.

    Args:
        before, now: parameter -> hash of its frozen entries.

    Raises:
        RuntimeError: the first five parameters are named.
    """
    moved = [name for name, value in before.items() if now[name] != value]
    if moved:
        raise RuntimeError(
            f"frozen entries of {listed(moved)} are not what they were when the plan was made "
            "(weights loaded from elsewhere, another dtype, or written to)"
        )


def listed(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"
