"""Rows of embeddings and heads that a command line names, alone or in a file.

``model.embed_tokens.weight:300-302,512`` are the rows 300, 301, 302 and 512 of that parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssah.selections import numbers_of
from ssah.selections import select_units as select_units  # its place in earlier releases


def select_rows(selection: Sequence[str]) -> dict[str, list[int]]:
    """The rows of parameters that a selection names: name -> numbers, ascending, each once.

    Args:
        selection: parts such as ``"lm_head.weight:300-302,512"``, whose stretches have both ends in
            them, or files with one such part a line. Parts of one name are joined.

    Raises:
        ValueError: a part has another form; it is named, with the line of its file. Whether a model
            has such rows is for `ssah.freeze` and `ssah.train_only` to say.
    """
    found: dict[str, set[int]] = {}
    for where, part in _parts(selection):
        name, _, text = part.rpartition(":")
        numbers = numbers_of(text, f"{where} of {name}")
        if not name or numbers is None:
            raise ValueError(
                f"{where} is {part!r}; it must be the name of a parameter and its rows, such as "
                "model.embed_tokens.weight:300-310,512, or a file of such lines"
            )
        found.setdefault(name, set()).update(numbers)
    return {name: sorted(numbers) for name, numbers in found.items()}


def _parts(selection: Sequence[str]) -> list[tuple[str, str]]:
    """Each part, with what a message calls it."""
    parts: list[tuple[str, str]] = []
    for text in selection:
        if not Path(text).is_file():
            parts.append(("rows", text))
            continue
        lines = Path(text).read_text(encoding="utf-8").splitlines()
        own = [(f"{text}:{n}", line.strip()) for n, line in enumerate(lines, start=1)]
        if not any(line for _, line in own):
            raise ValueError(f"rows is the file {text!r}, which is empty; it must name some rows")
        parts += [(where, line) for where, line in own if line]
    return parts
