"""``ssah delta``."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssah.choices import Combine, Kept, KeptScope
from ssah.cli.running import Result
from ssah.cli.selecting import check_selected, selected_in
from ssah.settings import check_settings, setting

if TYPE_CHECKING:
    from ssah.deltas import Rewound

ORDER = 57

# What is done -> the options that say how.
_EDITS: dict[str, tuple[str, ...]] = {
    "show": ("groups",),
    "interpolate": (),
    "rewind": ("groups",),
    "merge": ("scale", "keep", "by", "rescale", "scope", "seed"),
    "keep": ("by", "rescale", "scope", "seed"),
    "rank": (),
    "lora": (),
}


@dataclass(frozen=True)
class DeltaSettings:
    """One thing that is done with a delta, and how."""

    show: bool = setting(False, "How large it is, and where it lies.", panel="What to do")
    interpolate: float | None = setting(
        None, "Go this far from BASE to TUNED; beyond 1 is further.", panel="What to do"
    )
    rewind: tuple[str, ...] = setting(
        (),
        "Put back: `scu` or `cu:0.06` of `--groups`, `heads:2.26`, `layers:6-12` or the like, or a "
        "parameter or module by name; may be repeated.",
        panel="What to do",
    )
    keep: float | None = setting(
        None, "Keep this share of all elements, else BASE's.", panel="What to do", above=0, max=1
    )
    merge: Combine | None = setting(None, "Add what several TUNED learnt.", panel="What to do")
    rank: int | None = setting(
        None, "Keep the part of this rank of every matrix.", panel="What to do", min=1
    )
    lora: int | None = setting(
        None, "Write the change as a LoRA adapter of this rank.", panel="What to do", min=1
    )
    groups: Path | None = setting(None, "What `ssah classify` saved.", metavar="DIR", panel="How")
    scale: tuple[float, ...] = setting(
        (), "Of what `--merge` adds: one number, or one for each TUNED; 1.", panel="How"
    )
    by: Kept | None = setting(None, "Keep the largest, or some drawn; `magnitude`.", panel="How")
    rescale: bool = setting(False, "Divide what is kept by its share, as DARE does.", panel="How")
    scope: KeptScope | None = setting(None, "Rank over the `model`, or each tensor.", panel="How")
    seed: int | None = setting(None, "Of what is drawn; 0.", panel="How")

    def __post_init__(self) -> None:
        check_settings(self)
        given, edits = self._given(), self._edits()
        if len(edits) != 1:
            said = ", ".join(f"--{name}" for name in edits) or "none"
            raise ValueError(
                f"what to do is {said}; it must be one of "
                f"{', '.join(f'--{name}' for name in _EDITS)} (and --keep beside --merge)"
            )
        used = {self.edit, *_EDITS[self.edit]}
        if self.merge is not None and self.keep is None:  # all is kept
            used -= set(_EDITS["keep"])
        wrong = [name for name in given if name not in used]
        if wrong:
            raise ValueError(f"--{wrong[0]} is given, which --{self.edit} has no use for")

    @property
    def edit(self) -> str:
        """What is done."""
        return self._edits()[0]

    def _given(self) -> list[str]:
        # A value of 0 is given, and is equal to False.
        return [own.name for own in fields(self) if getattr(self, own.name) != own.default]

    def _edits(self) -> list[str]:
        given = [name for name in _EDITS if name in self._given()]
        # Beside --merge, --keep says how.
        return [name for name in given if name != "keep" or "merge" not in given]


def delta(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model before: folder, hub id or `smollm2`.")
    ],
    tuned: Annotated[
        list[str], typer.Argument(metavar="TUNED...", help="After training; several: `--merge`.")
    ],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder for the new model.")
    ] = None,
    settings: DeltaSettings,
) -> Result:
    """Measure what training changed, go a part of the way, put a selection back, or merge models.

    Example: `ssah delta smollm2 runs/aligned --interpolate 0.5 --out runs/half`

    The models are read tensor by tensor, so that they need not fit in memory. The new model is a
    folder like TUNED, with its tokenizer, and is written whole or not at all.
    """
    from rich.console import Console

    from ssah.deltas import RECORD
    from ssah.report.terminal import delta_tables, facts_table
    from ssah.storage import check_new

    _check(tuned, out, settings)
    if settings.show:
        found = _measured(base, tuned[0], settings)
        return Result(found, tuple(delta_tables(found)))
    assert out is not None  # `_check` refuses it
    check_new(out)  # a folder that is taken would be refused when a GGUF base has been loaded
    # An adapter is no model: it has a record of its own.
    if settings.lora is not None:
        return _adapter(base, tuned[0], settings.lora, out)
    with Console(stderr=True).status("computing, tensor by tensor"):
        _write(base, tuned, settings, out)
    # The file is the one account of what was done.
    record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    shown = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in record.items()
    }
    return Result({"out": str(out), **record}, (facts_table("Written", shown | {"to": out}),))


def _check(tuned: list[str], out: Path | None, settings: DeltaSettings) -> None:
    if settings.edit != "merge" and len(tuned) > 1:
        raise ValueError(f"TUNED is {len(tuned)} models; it must be one, unless with --merge")
    if settings.show and out is not None:
        raise ValueError("--out is given, which --show has no use for: it writes nothing")
    if not settings.show and out is None:
        raise ValueError(f"--out is not given; --{settings.edit} must have a folder to write to")


def _adapter(base: str, tuned: str, rank: int, out: Path) -> Result:
    from ssah.deltas import to_lora
    from ssah.report.terminal import facts_table

    left = to_lora(base, tuned, rank, out=out)
    found = {"out": str(out), "base": base, "tuned": tuned, "rank": rank, "left_out": left}
    facts = {
        "adapter": out,
        "of": base,
        "projections": len(left),
        "left out, at most": f"{max(left.values()):.2g} of a change's norm",
    }
    return Result(found, (facts_table("Written", facts),))


def _measured(base: str, tuned: str, settings: DeltaSettings) -> dict[str, Any]:
    from rich.console import Console

    from ssah.deltas import measure
    from ssah.groups import UnitGroups

    groups = None if settings.groups is None else UnitGroups.load(settings.groups)
    with Console(stderr=True).status("reading, tensor by tensor"):
        found = measure(base, tuned, groups)
    return {"base": base, "tuned": tuned, **found.to_dict()}


def _write(base: str, tuned: list[str], settings: DeltaSettings, out: Path) -> None:
    from ssah import deltas

    how: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("by", "rescale", "scope", "seed")
        if getattr(settings, name) is not None  # else the function has its default
    }
    if settings.interpolate is not None:
        deltas.interpolate(base, tuned[0], settings.interpolate, out=out)
    elif settings.rewind:
        deltas.rewind(base, tuned[0], _selection(settings, tuned[0]), out=out)
    elif settings.merge is not None:
        scale = settings.scale[0] if len(settings.scale) == 1 else settings.scale or 1.0
        share = 1.0 if settings.keep is None else settings.keep
        deltas.merge(base, tuned, how=settings.merge, scale=scale, share=share, **how, out=out)
    elif settings.keep is not None:
        deltas.keep(base, tuned[0], settings.keep, **how, out=out)
    elif settings.rank is not None:
        deltas.low_rank(base, tuned[0], settings.rank, out=out)


def _selection(settings: DeltaSettings, tuned: str) -> Rewound:
    """Groups, heads, layers and the like as the library has them; all else are names."""
    from ssah.models import empty_model
    from ssah.selections import is_selector

    texts = [part for part in settings.rewind if is_selector(part)]
    names = [part for part in settings.rewind if part not in texts]
    if not texts:
        if settings.groups is not None:
            raise ValueError("--groups is given, and --rewind names none of scu, ucu, ru, cu")
        return names
    units = check_selected(texts, settings.groups, "rewind")
    chosen = units or selected_in(empty_model(tuned), texts, settings.groups, "any")
    return [chosen, *names]
