"""What a plan is asked to train or to keep, turned into entries of parameters.

Units own rows and columns of projections. Beside them a plan takes names of parameters that train
or stay whole, and rows of embeddings and heads; or a selection of all of these, and of heads and
layers. Whatever is given becomes one selection, of what trains. Example, for a model to which two
tokens were added:

    train_only(model, rows={"model.embed_tokens.weight": [32000, 32001]})
    freeze(model, units, keep=["*norm*"], rows={"lm_head.weight": [2]})
    freeze(model, ssah.select(model, "layers:6-12 + heads:2.26"))
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ssah.selections import (
    Outline,
    Selection,
    matching_parameters,
    of_parameters,
    of_rows,
    of_units,
    row_numbers,
)
from ssah.training.entries import Entries, select_entries
from ssah.training.splitting import check_rows_split, check_weights_split
from ssah.units import DepthTwoModule, UnitSet
from ssah_kernels.sharded import is_sharded

Rows = Mapping[str, Sequence[int] | Tensor]  # parameter -> numbers of its rows


@dataclass(frozen=True, eq=False)
class Choice:
    """What trains.

    Attributes:
        units: what was given: of a selection, the units whose columns of B it has.
        trained_units: over every module of the model.
        masks: B's name -> bool ``[n_units]``, the units that train, of the modules of ``units``.
        entries: parameter -> which of its entries train.
    """

    units: UnitSet
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
        unfreeze: of a plan that keeps: whether parameters that require no gradient train too.
    """

    extra_parameters: Collection[str] = ()
    kept_parameters: Collection[str] = ()
    rows: Rows | None = None
    unfreeze: bool = False


def choose(
    model: nn.Module,
    modules: Mapping[str, DepthTwoModule],
    units: UnitSet | Selection,
    beside: Beside,
    *,
    keep: bool,
) -> Choice:
    """What trains, of a model that a plan can be made for.

    Args:
        model: the model.
        modules: its depth-2 modules by B's name.
        units: what stays frozen (``keep``), or what trains: units, or a selection.
        beside: what else does.
        keep: whether ``units`` stay.

    Raises:
        TypeError, ValueError: a name, a pattern or a row is not in the model; nothing would train.
    """
    extra = matching_parameters(model, beside.extra_parameters, "extra_parameters")
    kept = matching_parameters(model, beside.kept_parameters, "keep")
    if keep and not beside.unfreeze:
        kept |= {name for name, p in model.named_parameters() if not p.requires_grad}
    rows = _checked_rows(model, modules, {} if beside.rows is None else beside.rows, extra)
    outline = Outline.of(model)
    if isinstance(units, Selection):
        chosen = units.of(model)
        given = chosen.units
    else:
        # What a unit that stays reads must stay; what trains, nobody else may read.
        chosen = of_units(outline, units, "any" if keep else "all")
        given = units
    chosen = chosen | of_rows(outline, rows)
    trained = ~chosen if keep else chosen
    trained = (trained | of_parameters(outline, extra)) - of_parameters(outline, kept)
    entries = select_entries(modules, trained, single=True)
    _check_split(model, modules, entries, rows)
    trained_units = UnitSet({}, {name: m.n_units for name, m in modules.items()}) | given
    trained_units = trained_units.complement() if keep else trained_units
    masks = {name: trained_units.mask(name) for name in split_modules(modules, units)}
    if not any(each.some for each in entries.values()):
        raise ValueError(
            f"units ({_counted(units)}) leave nothing to train; give "
            "units that own something, or name parameters in extra_parameters="
            + (
                f". {len(kept)} of {len(entries)} parameters stay frozen whole: they are named in "
                "keep=, or had requires_grad=False (unfreeze=True lets those train)"
                if kept
                else ""
            )
        )
    return Choice(given, trained_units, masks, entries)


def _check_split(
    model: nn.Module,
    modules: Mapping[str, DepthTwoModule],
    entries: Mapping[str, Entries],
    rows: Collection[str],
) -> None:
    """Refuse parameters that cannot be split as ``entries`` says.

    Raises:
        ValueError: the parameter is named.
    """
    owned = {param for module in modules.values() for param in module.params}
    for name, each in entries.items():
        argument = "rows" if name in rows else "units"
        if each.single and each.partial:
            if is_sharded(model.get_parameter(name)):
                raise ValueError(
                    f"{argument} has single weights of {name!r}, of a model that is sharded; it "
                    "must be in one memory: choose units or rows, or do not shard it"
                )
            check_weights_split(model, name, argument)
        elif each.partial and name not in owned:
            check_rows_split(model, name, argument)


def split_modules(
    modules: Mapping[str, DepthTwoModule], units: UnitSet | Selection
) -> Collection[str]:
    """The modules of which ``units`` says that some entries train and some do not."""
    if isinstance(units, UnitSet):
        return units.keys()
    part = set(units) - set(units.whole)
    return [name for name, module in modules.items() if not part.isdisjoint(module.params)]


def _counted(units: UnitSet | Selection) -> str:
    if isinstance(units, Selection):
        return f"{len(units):,} weights, {units.fraction:.1%}"
    return f"{len(units)} of {sum(units.sizes.values())}"


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
        (canonical,) = matching_parameters(model, [name], "rows")
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
        result[canonical] = row_numbers(name, numbers, len(model.get_parameter(canonical)))
    return result
