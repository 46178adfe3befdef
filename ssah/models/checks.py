"""What loading a checkpoint must not do in silence: invent weights, or fail without a name."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ssah.models.finite import nonfinite_weight


class ModelError(ValueError):
    """A model that cannot be loaded; the message says why, and what to do."""


@contextmanager
def loading_errors(
    name: str, message: str = "model {name!r} cannot be loaded: {reason}"
) -> Iterator[None]:
    """Whatever transformers cannot load inside the block becomes a `ModelError` about ``name``."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except SafetensorError as error:
        reason = f"{_damaged(name) or 'a file of weights'} is damaged or was cut off ({error})"
        raise ModelError(message.format(name=name, reason=reason)) from error
    except Exception as error:
        # What a configuration says reaches any line of a model's code: a size of 0 divides by zero,
        # JSON nested too deeply is a RecursionError. A GPU without room is another thing.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, OSError | ValueError | ImportError):
            reason = f"{type(error).__name__}: {reason}"
        # "alined" may be a model of the Hub, so that it was looked for there.
        if not Path(name).exists() and near(Path(name)):
            reason = f"no folder here has that name{near(Path(name))}; on the Hub: {reason}"
        raise ModelError(message.format(name=name, reason=reason)) from error


def near(path: Path) -> str:
    """What the folder of ``path`` has instead, under a name that is nearly the same; or nothing."""
    there = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, there, n=1)
    return f" (there is {str(path.parent / found[0])!r})" if found else ""


def whole(cls: Any, source: str, **options: object) -> PreTrainedModel:
    """``cls.from_pretrained(source, **options)``, if the checkpoint has every weight of the model.

    transformers fills what is missing with random numbers and says so in a note alone.

    Args:
        cls: an auto class of transformers.
        source: a folder or hub id.

    Raises:
        ModelError: weights are missing or have another shape; they are named.

    A tensor that the model has no place for is a warning, and so is one that is NaN or infinite.
    """
    model: PreTrainedModel
    # Another shape is let pass so that it is named below, with the model.
    model, report = cls.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    other_shape = {key for key, *_ in report["mismatched_keys"]}
    # Tied weights and buffers that are computed are in neither: transformers leaves them out.
    for what, keys in (("lacks", report["missing_keys"]), ("has in another shape", other_shape)):
        if keys:
            raise ModelError(
                f"model {source!r} {what} {len(keys)} of its weights, {min(keys)!r} for one: they "
                "would be random numbers. The checkpoint is not whole, or its configuration is of "
                "another model"
            )
    # A tensor without a place does no harm by itself, and a weight that is not finite may be a row
    # that nothing reads: both are said, and the model is given.
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        warnings.warn(
            f"model {source!r} has {len(unexpected)} tensors that {type(model).__name__} has no "
            f"place for and that were not loaded, {unexpected[0]!r} for one (adapters, or layers "
            "beyond those that the configuration names)",
            stacklevel=3,
        )
    name = nonfinite_weight(model)
    if name is not None:
        warnings.warn(
            f"model {source!r} has weights that are NaN or infinite, in {name!r} for one: what "
            "needs them cannot be measured or trained. The checkpoint is damaged, or was written "
            "by a run that diverged",
            stacklevel=3,
        )
    return model


def _damaged(folder: str) -> str | None:
    """The first safetensors file of a folder whose header does not fit it, or None."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return f"the file {str(file)!r}"
    return None
