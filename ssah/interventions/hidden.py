"""Changes of hidden states: what layer l leaves in the residual stream, h of ``[hidden]`` a token.

    Add            h + v              h (1, 2), v (0, 3)                    gives (1, 5)
    ProjectOut     h - (h.u) u        u = d / |d|, d (0, 5), h (1, 2)       gives (1, 0)
    ScaleHidden    factor * h
    ReplaceHidden  v

With a strength s for each row it is h + s (changed - h): 0 leaves a row alone, 1 changes it wholly.
The strengths may be given, or computed of the prompts as these pass (`Prompts`). What is computed
is computed in float32 at least, and rounded once to the model's dtype.

Sources: Add, Turner et al., arXiv 2308.10248; ProjectOut, Arditi et al., arXiv 2406.11717.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from ssah.interventions.positions import At, OfPrompts, Passes, check_at
from ssah.interventions.sites import Site, modules_at
from ssah.models import check_bare, device_of, nonfinite, text_config
from ssah.settings import check_number
from ssah.units import layers_path

Layers = int | Iterable[int]


@dataclass(frozen=True, eq=False)
class HiddenChange(ABC):
    """What every change of hidden states has.

    Args:
        layers: which layers, from 0; a number or several.
        at: which tokens: ``"all"``, ``"last"`` (the last token of the prompt), ``"generated"``, or
            from a position on (a number, or integers ``[rows]``), counted without padding; or a
            function of `Prompts` that gives these positions.
        rows: which rows of the batch, bool ``[rows]``, or how strongly each, floats ``[rows]``;
            or a function of `Prompts` that gives them. None for all.
        site: where in a layer: ``"output"``, what it puts out; ``"input"``, what it is given;
            ``"attention"`` or ``"ffn"``, what that puts out, of the layers that have it.
    """

    layers: Layers
    at: At = field(default="all", kw_only=True)
    rows: Tensor | Sequence[float] | OfPrompts | None = field(default=None, kw_only=True)
    site: Site = field(default="output", kw_only=True)

    @abstractmethod
    def changed(self, h: Tensor, v: Tensor | None) -> Tensor:
        """``[rows, tokens, hidden]`` after the change; ``v`` is this layer's, ``[hidden]``."""


@dataclass(frozen=True, eq=False)
class Add(HiddenChange):
    """A vector is added to the hidden states that layers put out (steering).

    Args:
        vector: ``[hidden]``, or one for each layer, ``[layers, hidden]``.
    """

    vector: Tensor

    def changed(self, h: Tensor, v: Tensor | None) -> Tensor:  # [rows, tokens, hidden]
        assert v is not None
        return h + v


@dataclass(frozen=True, eq=False)
class ProjectOut(HiddenChange):
    """Hidden states that layers put out lose their part along a direction.

    Args:
        direction: ``[hidden]`` of any length above 0, or one for each layer, ``[layers, hidden]``.
    """

    direction: Tensor

    def changed(self, h: Tensor, v: Tensor | None) -> Tensor:  # [rows, tokens, hidden]
        assert v is not None
        return h - (h @ v)[..., None] * v  # v has length 1


@dataclass(frozen=True, eq=False)
class ScaleHidden(HiddenChange):
    """Hidden states that layers put out are multiplied by a number.

    Args:
        factor: the number.
    """

    factor: float

    def changed(self, h: Tensor, v: Tensor | None) -> Tensor:  # [rows, tokens, hidden]
        return h * self.factor


@dataclass(frozen=True, eq=False)
class ReplaceHidden(HiddenChange):
    """Hidden states that layers put out are replaced, for instance by those of a second model.

    Args:
        values: ``[hidden]``; one for each layer, ``[layers, hidden]``; or for each layer those of
            the one pass that is changed, ``[layers, rows, tokens, hidden]``.
    """

    values: Tensor

    def changed(self, h: Tensor, v: Tensor | None) -> Tensor:  # [rows, tokens, hidden]
        assert v is not None
        if v.dim() == 3 and v.shape != h.shape:
            raise ValueError(
                f"values are {list(v.shape)} a layer, the pass has {list(h.shape)}; they must be "
                "equal (at='last' replaces nothing after the pass over the prompts)"
            )
        return v.expand_as(h)


@dataclass(frozen=True, eq=False)
class AtLayer:
    """One change at one place in one layer.

    Attributes:
        module: whose output is changed, or whose input.
        change: what is done to it.
        value: ``[hidden]``, or ``[rows, tokens, hidden]`` of `ReplaceHidden`, or None.
        rows: bools or floats ``[rows]``, what computes them, or None.
    """

    module: nn.Module
    change: HiddenChange
    value: Tensor | None
    rows: Tensor | OfPrompts | None

    def __call__(self, given: Tensor, passes: Passes) -> Tensor:
        """``[rows, tokens, hidden]`` after the change, where the pass has its positions and rows.

        Raises:
            ValueError: the batch has another number of rows, or the pass tells no positions.
        """
        # First: it is asked about the prompts, also for a change that begins after them.
        strength = passes.of_prompts(self.rows) if callable(self.rows) else self.rows
        at = passes.chosen(self.change.at)  # bool [rows, tokens], or one bool for all of them
        if at is False:  # such as a step after the prompts
            return given
        h = given
        if h.dim() == 2 and len(h) == passes.shape[0] * passes.shape[1]:
            h = h.reshape(*passes.shape, -1)  # some modules are given the rows one after the other
        if h.dim() != 3:
            raise ValueError(
                f"a {type(self.module).__name__} puts out {list(h.shape)}; must be [rows, tokens, "
                "hidden] for its hidden states to be changed"
            )
        work = h.to(torch.promote_types(h.dtype, torch.float32))
        value = None if self.value is None else self.value.to(h.device, work.dtype)
        new = self.change.changed(work, value)
        if strength is not None:
            if len(strength) != len(h):
                raise ValueError(
                    f"rows has {len(strength)} rows, the batch {len(h)}; must be equal (beams "
                    "are rows too)"
                )
            strength = strength.to(h.device)[:, None]  # [rows, 1]
            at = strength != 0 if at is True else at.to(h.device) & (strength != 0)
            if strength.is_floating_point():
                new = work + strength.to(work.dtype)[..., None] * (new - work)
        new = new.to(h.dtype)
        new = new if at is True else torch.where(at.to(h.device)[..., None], new, h)
        return new.reshape(given.shape)


def plan_hidden(model: nn.Module, change: HiddenChange) -> list[AtLayer]:
    """``change`` at each of its layers; nothing is changed yet.

    Raises:
        TypeError: a vector is no tensor, or a factor no number.
        ValueError: layers, positions, rows or a site that no model has, a vector of another size,
            zero where it is a direction, or a factor or a vector that is NaN or infinite.
    """
    check_at(change.at)
    found = list(model.get_submodule(layers_path(model)).children())
    layers = [change.layers] if isinstance(change.layers, int) else list(change.layers)
    wrong = [each for each in layers if not isinstance(each, int) or not 0 <= each < len(found)]
    if wrong or not layers or len(set(layers)) < len(layers):
        raise ValueError(
            f"layers is {layers}; must be different numbers of layers, from 0 to {len(found) - 1}"
        )
    rows = _rows(change)
    planned = []
    values = _values(model, change, len(layers))
    for i, value, modules in zip(
        layers, values, modules_at(model, layers, change.site), strict=True
    ):
        # What is linear may be done to each part of a sum.
        if len(modules) > 1 and not isinstance(change, ProjectOut | ScaleHidden):
            raise ValueError(
                f"site is {change.site!r}, which layer {i} has in {len(modules)} parts (experts); "
                "it must be 'output' or 'input' for this change"
            )
        # Where the layer computes, so that no pass copies it there.
        place = _place(found[i])
        own = None if value is None else value.to(place)
        strengths = rows.to(place) if isinstance(rows, Tensor) else rows
        planned += [AtLayer(module, change, own, strengths) for module in modules]
    return planned


def _rows(change: HiddenChange) -> Tensor | OfPrompts | None:
    """Bools or floats ``[rows]`` as they were given, or what computes them."""
    if change.rows is None or callable(change.rows):
        return change.rows
    rows = torch.as_tensor(change.rows)
    if rows.dim() != 1 or not bool(rows.isfinite().all()):
        raise ValueError(
            f"rows is {rows.dtype} {list(rows.shape)}; must be [rows], one bool or one finite "
            "number each"
        )
    return rows if rows.is_floating_point() or rows.dtype == torch.bool else rows.float()


def _values(model: nn.Module, change: HiddenChange, layers: int) -> list[Tensor | None]:
    """What is added, projected out or put in, for each layer: ``[hidden]``, or None."""
    if isinstance(change, ScaleHidden):
        check_number("factor", change.factor)
        return [None] * layers
    name = next(f.name for f in fields(change) if f.name in ("vector", "direction", "values"))
    given = getattr(change, name)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is {type(given).__name__}, must be a tensor [hidden]")
    hidden = text_config(model).hidden_size
    shapes: list[tuple[int, ...]] = [(hidden,), (layers, hidden)]
    whole = isinstance(change, ReplaceHidden) and given.dim() == 4
    if whole:
        shapes = [(layers, *given.shape[1:3], hidden)]
    if tuple(given.shape) not in shapes or not given.is_floating_point():
        raise ValueError(
            f"{name} is {given.dtype} {list(given.shape)}; must be floating point [{hidden}], or "
            f"one for each layer, [{layers}, ..., {hidden}]"
        )
    if nonfinite([(name, given)]) is not None:
        raise ValueError(f"{name} is NaN or infinite; must be finite")
    given = given.detach()
    if not whole:
        given = given.expand(layers, hidden)
    if isinstance(change, ProjectOut):
        given = given.double()
        lengths = given.norm(dim=1, keepdim=True)  # [layers, 1]
        if not bool((lengths > 0).all()):
            raise ValueError(f"{name} is zero; must have a length above 0")
        given = given / lengths
    return list(given.to(torch.promote_types(check_bare(model).dtype, torch.float32)))


def _place(layer: nn.Module) -> torch.device:
    """Where ``layer`` computes: offloaded weights are fetched for each of its parts by itself."""
    parts = (part for part in layer.modules() if any(True for _ in part.parameters(recurse=False)))
    return device_of(next(parts))
