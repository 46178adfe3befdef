"""What ``ssah finetune`` and ``ssah align`` are given: a selection, rows, a folder, requests."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssah.cli.selecting import check_selected, selected_in
from ssah.settings import check_settings, setting
from ssah.studies.evaluate import EvaluateSettings, answer_tokens

if TYPE_CHECKING:
    from ssah.choices import Shared
    from ssah.data import Reading
    from ssah.selections import Selection
    from ssah.training import UpdatePlan

# What `--freeze` and `--train` say of no units, and `--over-refusal` of no requests.
NOTHING = "none"


@dataclass(frozen=True)
class RunOptions:
    """The rows of a run, and what it leaves behind."""

    out: Path | None = setting(
        None, "Folder of the run; not for `--dry-run`.", option="--out -o", metavar="DIR"
    )
    eval_data: str | None = setting(
        None, "Rows whose loss is measured before and after.", panel="Data"
    )
    split: str | None = setting(None, "Of a hub data set.", panel="Data")
    limit: int | None = setting(None, "Rows read.", panel="Data", min=1)
    max_length: int = setting(512, "Tokens kept of a row.", panel="Data", min=2)
    merge: bool = setting(False, "Also save the whole model.", panel="Run")
    keep_checkpoints: bool = setting(False, "Also when the run is finished.", panel="Run")
    dry_run: bool = setting(False, "Show what trains and the memory it takes.", panel="Run")

    @property
    def folder(self) -> Path:
        """Where the run is written to."""
        assert self.out is not None  # `check` refuses it
        return self.out

    def check(self) -> None:
        """Raise ValueError, before a model is loaded, where the run could not be written."""
        from ssah.storage import check_free
        from ssah.training.finetune import check_folder

        if self.dry_run:  # it writes nothing
            return
        if self.out is None:
            raise ValueError("out is missing: give --out DIR, or --dry-run")
        check_folder(self.out)  # a folder that has another run would be refused hours later
        check_free(self.out)


_safety = partial(setting, panel="Is it still safe?")


@dataclass(frozen=True)
class AskedSafety:
    """What a model is asked before and after it trains; the answers are judged and forgotten."""

    requests: tuple[str, ...] = _safety(
        (),
        "Harmful, and how many are refused is measured before and after: .txt, CSV, JSONL, "
        "`FILE[a:b]`, `builtin:safety_eval`; may be repeated.",
    )
    over_refusal: str = _safety("builtin:overrefusal", "Harmless but dangerous-looking, or `none`.")
    # What `ssah evaluate` does where nothing else is said, so that figures compare.
    judge: str = _safety(EvaluateSettings.judges[0], "As `ssah evaluate` takes it.")
    max_new_tokens: int = answer_tokens(panel="Is it still safe?")

    def __post_init__(self) -> None:
        check_settings(self)
        beside = (own for own in fields(self) if own.name != "requests")
        given = [own.name for own in beside if getattr(self, own.name) != own.default]
        if given and not self.requests:
            raise ValueError(
                f"{given[0]} is {getattr(self, given[0])!r} without requests, must be left out: "
                "nothing is measured without --requests"
            )

    def read(self, reading: Reading) -> dict[str, Any] | None:
        """Arguments of `ssah.evaluation.Refusals`; None where nothing is measured."""
        from ssah.evaluation import distinct_judges

        if not self.requests:
            return None
        harmless = [] if self.over_refusal == NOTHING else reading.requests(self.over_refusal)
        (judge,) = distinct_judges([self.judge], self.max_new_tokens)
        return {
            "requests": [each for name in self.requests for each in reading.requests(name)],
            "over_refusal": harmless,
            "judge": judge,
            "max_new_tokens": self.max_new_tokens,
            "overlong": reading.overlong,
            "progress": True,
        }


@dataclass(frozen=True)
class Selected:
    """What a command names.

    Attributes:
        mode: whether it is frozen, or it alone trains.
        names: groups, shares of groups and other selections, such as ``["scu", "cu:0.06"]`` and
            ``["layers:6-12"]``, or ``["none"]``.
        groups: folder that has the groups, or None.
        rows: of embeddings and heads, as `ssah.training.finetune.select_rows` takes them.
        keep: names or patterns of parameters that are frozen whole; not where the rest trains.
    """

    mode: Literal["freeze", "train"]
    names: list[str]
    groups: Path | None = None
    rows: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ValueError, before a model is loaded, for a selection that cannot be."""
        from ssah.selections import names_groups
        from ssah.training.finetune import select_rows

        select_rows(self.rows)
        if NOTHING in self.names:
            if len(self.names) > 1 or self.groups is not None:
                raise ValueError(f"{self.mode} is none: it must stand alone, and without --groups")
            if self.mode == "train" and not self.rows:
                raise ValueError("train is none: nothing would train; give --rows, or units")
        elif self.groups is None and names_groups(self.names):
            raise ValueError(f"groups is missing: give --groups DIR, or --{self.mode} none")
        else:
            check_selected(self.names, self.groups, self.mode)

    def plan(self, model: Any) -> UpdatePlan:
        """The plan for ``model``; without units for ``none``."""
        from ssah.training import freeze, train_only
        from ssah.training.finetune import select_rows
        from ssah.units import UnitSet, find_modules

        rows = select_rows(self.rows)
        chosen: UnitSet | Selection
        if NOTHING in self.names:
            chosen = UnitSet({}, {b: module.n_units for b, module in find_modules(model).items()})
        else:
            # What stays keeps all that it reads; of what trains, nobody else reads anything.
            shared: Shared = "any" if self.mode == "freeze" else "all"
            chosen = selected_in(model, self.names, self.groups, shared)
        if self.mode == "freeze":
            return freeze(model, chosen, keep=self.keep, rows=rows)
        return train_only(model, chosen, rows=rows)

    def record(self) -> dict[str, Any]:
        """For the JSON of the run."""
        from ssah.training.finetune import select_rows

        # What was not given is left out, so that the records of other runs stay as they were.
        beside = {"keep": list(self.keep), "parameter_rows": select_rows(self.rows)}
        given = {key: value for key, value in beside.items() if value}
        groups = None if self.groups is None else str(self.groups)
        return {"groups": groups, self.mode: self.names, **given}
