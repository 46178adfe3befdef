"""Options that several commands have: the model and its weights, rows, folders."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssah.choices import Dtype, Overlong
from ssah.settings import setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.data import Reading
    from ssah.studies import Loading

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder, .gguf, hub id, `smollm2`, or an update of one."),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the result.")]
Groups = Annotated[
    Path, typer.Option("--groups", metavar="DIR", help="What `ssah classify` saved.")
]
Data = Annotated[str, typer.Option("--data", help="File, `builtin:safety` or the like, or hub id.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows run at a time.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=2, help="Tokens kept of a row.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Rows read.")]

RunFolder = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run.")]
SaveModel = Annotated[
    bool,
    typer.Option(
        "--save-model", help="Keep the trained models in DIR/models.", rich_help_panel="Training"
    ),
]


@dataclass(frozen=True)
class ScoredSets:
    """The rows by which a study scores and groups units."""

    safety: str = setting(
        MISSING,
        "Scored for safety: File, `builtin:safety` or the like, or hub id; `FILE[a:b]`: rows a to "
        "b - 1.",
        panel="Data",
    )
    utility: str = setting(MISSING, "Scored for utility: likewise.", panel="Data")


@dataclass(frozen=True)
class MeasuredSets(ScoredSets):
    """The same, and those by which it measures a model."""

    requests: tuple[str, ...] = setting(
        MISSING,
        "Harmful requests: .txt, CSV, JSONL or `builtin:...`, `FILE[a:b]`; may be repeated.",
        panel="Data",
    )
    utility_eval: str = setting(MISSING, "Rows for the utility loss.", panel="Data")


@dataclass(frozen=True)
class Weights:
    """How the weights of a model are loaded."""

    dtype: Dtype = setting("auto", "Weights; `auto`: as stored.")
    device: str = setting("auto", "`auto`: a GPU if there is one.")
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")
    base: str | None = setting(
        None, "Of an update: what it was trained from; default: as it says.", metavar="MODEL"
    )
    device_map: str | None = setting(
        None,
        "Deal the model to all GPUs, then to memory: `auto`, `balanced`, `cpu`, or modules and "
        'their devices as JSON, `{"": 0}`. A command that trains refuses it.',
        metavar="MAP",
    )
    offload_folder: str | None = setting(
        None, "With --device-map: folder for weights that fit nowhere else.", metavar="DIR"
    )
    # No option here: such weights are scored and run, and not trained.
    packed: bool = False

    @property
    def places(self) -> str | dict[str, Any] | None:
        """``--device-map`` as `ssah.models.load_model` takes it.

        Raises:
            ValueError: it begins as JSON does, and is not JSON.
        """
        if self.device_map is None or not self.device_map.startswith("{"):
            return self.device_map
        try:
            found: dict[str, Any] = json.loads(self.device_map)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--device-map is {self.device_map!r}, must be JSON where it begins with a brace: "
                f"{error}"
            ) from error
        return found

    def load(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer, with a spinner on standard error meanwhile."""
        from rich.console import Console

        from ssah.models import quiet
        from ssah.report.terminal import as_data
        from ssah.training import load_trained

        # Standard output is the result's.
        with Console(stderr=True).status(f"loading {as_data(name)}"), quiet():
            return load_trained(
                name,
                base=self.base,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                packed=self.packed,
                device_map=self.places,
                offload_folder=self.offload_folder,
            )

    def loading(self, name: str, rows: Rows) -> Loading:
        """How a study loads the model, which it does when it has read its rows."""
        from ssah.studies import Loading

        # Nothing is loaded yet: rows that are wrong are refused first, which takes no time.
        return Loading(
            name,
            self.dtype,
            self.device,
            self.trust_remote_code,
            rows.reading(),
            self.base,
            self.places,
            self.offload_folder,
        )


@dataclass(frozen=True)
class PackedWeights(Weights):
    """Weights that may stay as a file packs them."""

    packed: bool = setting(False, "Keep a .gguf in its blocks: less memory, slower.")


@dataclass(frozen=True)
class FastWeights(Weights):
    """Weights of a model that is measured: a study computes in what is fast."""

    # The same field with another promise: a study times both types before it chooses.
    dtype: Dtype = setting("auto", "`auto`: what is faster here.")


_row = partial(setting, panel="Rows and template")  # one heading for all of them in --help


@dataclass(frozen=True)
class Rows:
    """How a command reads its rows and renders them: one choice for all of its data sets."""

    prompt_column: str | None = _row(None, "Where the prompt stands.")
    response_column: str | None = _row(None, "Where the response stands.")
    skip_invalid: bool = _row(False, "Leave empty and unreadable rows out, and count them.")
    overlong: Overlong = _row(
        "cut",
        "Rows beyond --max-length: `cut` the response; `skip`: leave rows out whose prompt alone "
        "is too long; `error`.",
    )
    template: str | None = _row(
        None,
        "Chat template in place of the model's.",
        metavar="FILE|NAME",
    )
    template_option: tuple[str, ...] = _row(
        (),
        "For the chat template, `enable_thinking=false`; its date: `strftime_now=2024-07-26`. May "
        "be repeated.",
        metavar="KEY=VALUE",
    )

    def reading(self) -> Reading:
        """The same for the library, which parses the options of the template."""
        from ssah.data import Reading, template_options

        return Reading(
            prompt_column=self.prompt_column,
            response_column=self.response_column,
            invalid="skip" if self.skip_invalid else "error",
            overlong=self.overlong,
            template=self.template,
            template_options=template_options(self.template_option),
        )
