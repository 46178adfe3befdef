"""What a plan is asked to train or to keep, turned into entries of parameters.

Units own rows and columns of projections (`ssah.training.entries`). Beside them a plan takes names
of parameters that train or stay whole, and rows of embeddings and heads. Example, for a model to
which two tokens were added:

    train_only(model, rows={"model.embed_tokens.weight": [32000, 32001]})
    freeze(model, units, keep=["*norm*"], rows={"lm_head.weight": [2]})

Single weights are chosen by masks of one bit each, of any parameter:

    train_only(model, weights={"model.layers.0.mlp.up_proj.weight": BitMask.of(mask)})
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ssah.training.entries import Entries, choose_weights, select_entries
from ssah.training.splitting import check_rows_split, check_weights_split
from ssah.units import BitMask, DepthTwoModule, UnitSet
from ssah_kernels.sharded import is_sharded

Rows = Mapping[str, Sequence[int] | Tensor]  # parameter -> numbers of its rows
Weights = Mapping[str, BitMask]  # parameter -> single weights of it


@dataclass(frozen=True, eq=False)
class Choice:
    """What trains.

    Attributes:
        trained_units: over every module of the model.
        masks: B's name -> bool ``[n_units]``, the units that train, of the modules of ``units``.
        entries: parameter -> which of its entries train.
    """

    trained_units: UnitSet
    masks: dict[str, Tensor]
    entries: dict[str, Entries]


@dataclass(frozen=True, eq=False)
class Beside:
    """What is said beside units.

    Attributes:
        extra_parameters, kept_parameters: names or patterns of parameters that train whole, and
            of those that stay whole.
        rows: rows that do what the units do: stay, or train.
        weights: single weights that do what the units do.
        unfreeze: of a plan that keeps: whether parameters that require no gradient train too.
    """

    extra_parameters: Collection[str] = ()
    kept_parameters: Collection[str] = ()
    rows: Rows | None = None
    weights: Weights | None = None
    unfreeze: bool = False


def choose(
    model: nn.Module,
    modules: Mapping[str, DepthTwoModule],
    units: UnitSet,
    beside: Beside,
    *,
    keep: bool,
) -> Choice:
    """What trains, of a model that a plan can be made for.

    Args:
        model: the model.
        modules: its depth-2 modules by B's name.
        units: what stays frozen (``keep``), or what trains.
        beside: what else does.
        keep: whether ``units`` stay.

    Raises:
        TypeError, ValueError: a name, a pattern or a row is not in the model; nothing would train.
    """
    extra = _matching(model, beside.extra_parameters, "extra_parameters")
    kept = _matching(model, beside.kept_parameters, "keep")
    if keep and not beside.unfreeze:
        kept |= {name for name, p in model.named_parameters() if not p.requires_grad}
    rows = _checked_rows(model, modules, {} if beside.rows is None else beside.rows, extra)
    weights = _checked_weights(model, {} if beside.weights is None else beside.weights, extra)
    given = UnitSet({}, {name: m.n_units for name, m in modules.items()}) | units
    trained_units = given.complement() if keep else given
    masks = {name: trained_units.mask(name) for name in units}  # bool [n_units] each
    entries = select_entries(model, modules, masks, rest=keep, extra=extra, kept=kept, rows=rows)
    choose_weights(entries, weights, train=not keep)
    if not any(each.some for each in entries.values()):
        raise ValueError(
            f"units ({len(units)} of {sum(units.sizes.values())}) leave nothing to train; give "
            "units that own something, or name parameters in extra_parameters="
            + (
                f". {len(kept)} of {len(entries)} parameters stay frozen whole: they are named in "
                "keep=, or had requires_grad=False (unfreeze=True lets those train)"
                if kept
                else ""
            )
        )
    return Choice(trained_units, masks, entries)


def _matching(model: nn.Module, patterns: Collection[str], argument: str) -> set[str]:
    """Names as ``model.named_parameters()`` gives them: of tied parameters, the first.

    Args:
        model: the model.
        patterns: names of parameters, or patterns of them as :mod:`fnmatch` reads them.
        argument: the name of that argument, for the message.

    Raises:
        TypeError: ``patterns`` is no collection of names.
        ValueError: the model lacks one; it is named.
    """
    if isinstance(patterns, str | Mapping) or not isinstance(patterns, Collection):
        kind = {str: "string", dict: "mapping"}.get(type(patterns), type(patterns).__name__)
        raise TypeError(
            f"{argument} is a {kind}, must be a collection of parameter names, or patterns such as "
            "'*norm*': it is for whole parameters; some of their rows are for rows="
        )
    first = {id(p): name for name, p in model.named_parameters()}
    every = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    found: set[str] = set()
    unknown: list[str] = []
    for pattern in patterns:
        own = {canonical for name, canonical in every.items() if fnmatchcase(name, pattern)}
        found |= own
        if not own:
            unknown.append(pattern)
    if unknown:
        raise ValueError(
            f"{argument} has names that the model lacks: {', '.join(unknown)}; they "
            "must be from model.named_parameters(), or patterns of them such as '*norm*'"
        )
    return found


def _checked_rows(
    model: nn.Module, modules: Mapping[str, DepthTwoModule], rows: Rows, extra: Collection[str]
) -> dict[str, Tensor]:
    """Rows by canonical name, int64 ``[rows]``, ascending.

    Raises:
        TypeError, ValueError: the parameter or the row is named.
    """
    if not isinstance(rows, Mapping):
        raise TypeError(
            f"rows is a {type(rows).__name__}, must be a mapping of parameter names to the numbers "
            "of their rows, such as {'model.embed_tokens.weight': [5, 7]}"
        )
    owned = {param for module in modules.values() for param in module.params}
    result: dict[str, Tensor] = {}
    for name, numbers in rows.items():
        if not isinstance(name, str):
            raise TypeError(f"rows has the key {name!r}, must be the name of a parameter")
        (canonical,) = _matching(model, [name], "rows")
        if canonical in owned:
            raise ValueError(
                f"rows has {name!r}, of which units own entries: choose among them with units"
            )
        if canonical in extra:
            raise ValueError(
                f"rows has {name!r}, which extra_parameters trains whole: name it in one of them"
            )
        if canonical in result:
            raise ValueError(f"rows has {name!r} twice: it is tied to another name that is given")
        check_rows_split(model, canonical)
        result[canonical] = _checked_numbers(name, numbers, len(model.get_parameter(canonical)))
    return result


def _checked_numbers(name: str, numbers: Sequence[int] | Tensor, n_rows: int) -> Tensor:
    """``numbers`` as int64 ``[rows]`` on the CPU, ascending and each once."""
    if isinstance(numbers, Tensor) and numbers.dtype is torch.bool:
        raise TypeError(f"rows has a mask for {name!r}, must be row numbers: mask.nonzero()[:, 0]")
    if isinstance(numbers, Tensor):
        numbers = numbers.tolist()
    if isinstance(numbers, str) or not isinstance(numbers, Collection):
        raise TypeError(f"rows has {numbers!r} for {name!r}, must be a list of row numbers")
    wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int)]
    wrong = wrong or [n for n in numbers if not 0 <= n < n_rows]
    if wrong or not len(numbers):
        raise ValueError(
            f"rows has {wrong[0] if wrong else 'no row'!r} for {name!r}, must have whole numbers "
            f"from 0 to {n_rows - 1}; tokens that are added come first "
            "(model.resize_token_embeddings), then the plan"
        )
    return torch.tensor(sorted(set(numbers)), dtype=torch.int64)


def _checked_weights(
    model: nn.Module, weights: Weights, extra: Collection[str]
) -> dict[str, Tensor]:
    """Single weights by canonical name, bool of the parameter's shape.

    Raises:
        TypeError, ValueError: the parameter is named.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights is a {type(weights).__name__}, must be a mapping of parameter names to "
            "ssah.units.BitMask, such as {'model.norm.weight': BitMask.of(mask)}"
        )
    result: dict[str, Tensor] = {}
    for name, chosen in weights.items():
        if not isinstance(name, str) or not isinstance(chosen, BitMask):
            raise TypeError(
                f"weights has {type(chosen).__name__} for {name!r}, must have a parameter's name "
                "and a BitMask: BitMask.of(mask), of a bool mask of its shape"
            )
        (canonical,) = _matching(model, [name], "weights")
        parameter = model.get_parameter(canonical)
        if chosen.shape != tuple(parameter.shape):
            raise ValueError(
                f"weights has a mask of shape {list(chosen.shape)} for {name!r}, must have "
                f"{list(parameter.shape)}, the shape of the parameter"
            )
        if not chosen.count:
            raise ValueError(f"weights has a mask without a weight for {name!r}: leave it out")
        if canonical in extra:
            raise ValueError(
                f"weights has {name!r}, which extra_parameters trains whole: name it in one of them"
            )
        if canonical in result:
            raise ValueError(
                f"weights has {name!r} twice: it is tied to another name that is given"
            )
        if is_sharded(parameter):
            raise ValueError(
                f"weights has {name!r} of a model that is sharded, must be of one in one memory: "
                "choose units or rows, or do not shard it"
            )
        check_weights_split(model, canonical)
        result[canonical] = chosen.to_mask()
    return result
