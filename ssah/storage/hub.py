"""Results on the Hugging Face Hub: fetched by ``"hf:user/name"``, and uploaded with a card.

Example of a card's table of figures, for ``{"attack success": {"rate": 0.05, "interval": [0.02,
0.11], "n": 100}}``:

    | figure | value | interval | n |
    |---|---|---|---|
    | attack success | 0.05 | 0.02 to 0.11 | 100 |
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from ssah.version import __version__

HUB = "hf:"  # before the id of a repository


def hub_folder(directory: str | os.PathLike[str]) -> str:
    """The folder that is meant, fetched if it is a repository; FileNotFoundError without one."""
    name = os.fspath(directory)
    if name.startswith(HUB):
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(name.removeprefix(HUB))
        except (OSError, ValueError) as error:  # some of them do not say what was to be fetched
            raise FileNotFoundError(
                f"{name!r} could not be fetched from the Hugging Face Hub: {error}"
            ) from error
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"there is no folder {name!r}; for a repository on the Hugging Face Hub write "
            f"'{HUB}{name if name.count('/') == 1 else 'user/name'}'"
        )
    return name


def public_name(name: str) -> str:
    """A hub id as it is; of a path on this machine the last part alone, which tells nobody more."""
    is_id = name.count("/") <= 1 and not name.startswith((".", "~", "/")) and "\\" not in name
    # A record may name a path of another system, and this one's rule leaves that whole.
    return name if is_id and not Path(name).exists() else PureWindowsPath(name).name


def upload(
    write: Callable[[Path], None],
    card: str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a result of ssah",
) -> str:
    """Upload a result with its card.

    Args:
        write: writes the result to a folder; nothing that it writes may tell a path.
        card: ``README.md``, see `result_card`.
        repo_id: ``"user/name"``; created if it does not exist.
        private, token, commit_message: as in ``huggingface_hub``.

    Returns:
        the address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        (Path(folder) / "README.md").write_text(card, "utf-8")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        )


def result_card(
    title: str,
    what: str,
    *,
    base_model: str,
    tags: Sequence[str],
    code: str,
    facts: Mapping[str, Any],
    figures: Mapping[str, Any] | None = None,
) -> str:
    """``README.md`` of a result, as the Hub shows it.

    Args:
        title: its heading, without the model.
        what: what it is, in full sentences.
        base_model: hub id of the model, or its `public_name`.
        tags: beside ``"ssah"``.
        code: Python that loads it.
        facts: what identifies it; None where nobody knows. The hash of data is one of them.
        figures: what was measured: name -> ``rate`` (or ``value``), its ``interval`` and, if
            known, ``n``, as `ssah.evaluation.rate` gives them.

    Raises:
        ValueError: a figure has no value or no interval; it is named.
    """
    model = base_model.removeprefix(HUB)
    rows = [f"| {name} | {'not known' if x is None else f'`{x}`'} |" for name, x in facts.items()]
    measured = [_figure(name, figure) for name, figure in (figures or {}).items()]
    if measured:
        head = ["| figure | value | interval | n |", "|---|---|---|---|"]
        shown = "\n".join([*head, *measured])
    else:
        shown = "Nothing was measured with it, or whoever uploaded it gave no figures."
    # As JSON, a name that YAML would read as something else stays the text that it is.
    header = [f"base_model: {json.dumps(model)}", "library_name: ssah", "tags:"]
    header += [f"- {tag}" for tag in ("ssah", *tags)]
    return "\n".join(
        [
            *("---", *header, "---", ""),
            *(f"# {title} of {model}", "", f"{what} Written by ssah {__version__}.", ""),
            *("```python", code, "```", ""),
            *("## What it belongs to", "", "| | |", "|---|---|", *rows, ""),
            *("## What was measured", "", shown, ""),
        ]
    )


def _figure(name: str, figure: Any) -> str:
    """One row of the table."""
    found = figure if isinstance(figure, Mapping) else {}
    value, interval = found.get("rate", found.get("value")), found.get("interval")
    pair = list(interval) if isinstance(interval, Sequence) else []
    numbers = [value, *pair]
    known = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
    if len(pair) != 2 or not known or pair[0] > pair[1]:
        raise ValueError(
            f"figures[{name!r}] is {figure!r}, must have a rate (or value) and its interval, as "
            "ssah.evaluation.rate gives them: without it nobody can tell it from chance"
        )
    n = found.get("n")
    return f"| {name} | {value:.4g} | {pair[0]:.4g} to {pair[1]:.4g} | {'' if n is None else n} |"
