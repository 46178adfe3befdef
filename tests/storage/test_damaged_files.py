"""Thousands of damaged files: each is refused by name, or what is read is what was written."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from plans import snapshot
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ssah.attribution import Attribution, attribute
from ssah.groups import UnitGroups, classify
from ssah.models import Checkpoint
from ssah.training import freeze, load_update
from ssah.training.finetune.checkpoints import last_sound, seal

pytestmark = pytest.mark.xdist_group("damaged files")  # its fixtures are made once

IDENTITY = {"lr": 1e-3}


def model() -> PreTrainedModel:
    return tiny_models.build("llama")


def batches() -> list[dict[str, torch.Tensor]]:
    return [tiny_models.collate(tiny_models.rows((9, 5), seed=seed)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind of thing that is read back."""
    folder = tmp_path_factory.mktemp("sound")
    first, second = batches()
    safety, utility = attribute(model(), [first]), attribute(model(), [second])
    safety.save(folder / "scores")
    groups = classify(safety, utility, scu=0.1, ucu=0.1, ru=0.3)
    groups.save(folder / "groups")
    freeze(model(), groups["scu"]).save_pretrained(folder / "update")
    loader = iter([first])

    def cut() -> Iterator[Any]:
        yield from loader
        raise InterruptedError

    with pytest.raises(InterruptedError):
        attribute(model(), cut(), resume_dir=folder / "unfinished", save_every_seconds=0)
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for name, size in (("model.safetensors", 3000), ("optimizer.pt", 2000), ("rng.pth", 300)):
        (checkpoint / name).write_bytes(random.Random(size).randbytes(size))
    seal(checkpoint, ("optimizer.pt",), IDENTITY)
    (folder / "model").mkdir()
    save_file({k: v.contiguous() for k, v in snapshot(model()).items()}, folder / "model" / WEIGHTS)
    return folder


WEIGHTS = "model.safetensors"


def _update(folder: Path) -> Any:
    base = model()
    load_update(base, folder)
    return snapshot(base)


def _unfinished(folder: Path) -> Any:
    result = attribute(model(), batches(), resume_dir=folder)
    return {**result.scores, **result.mean, **result.variance}


def _checkpoint(folder: Path) -> Any:
    found = last_sound(folder, IDENTITY, lambda line: None)
    if found is None:
        raise ValueError(f"{folder}: nothing is there, and the run starts anew")
    return {file.name: torch.frombuffer(file.read_bytes(), dtype=torch.uint8)
            for file in found.glob("*.*[!n]")}  # fmt: skip


def _groups(folder: Path) -> Any:
    groups = UnitGroups.load(folder)
    return {**groups.safety, **{name: groups.labels(name) for name in groups.sizes}}


READ: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
    "scores": lambda folder: Attribution.load(folder).scores,
    "groups": _groups,
    "update": _update,
    "unfinished": _unfinished,
    "checkpoints": _checkpoint,
}


def damage(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    how = draw.choice(("truncated", "flipped", "zeroed"))
    at = draw.randrange(len(content))
    if how == "truncated":
        content = content[:at]
    elif how == "flipped":
        content[at] ^= 1 << draw.randrange(8)
    else:
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(bytes(content))
    return f"{path.name} {how} at {at}"


@pytest.mark.parametrize(
    "times", [12, pytest.param(520, marks=pytest.mark.exhaustive)], ids=["sample", "all"]
)
@pytest.mark.parametrize("kind", READ)
def test_a_damaged_file_is_refused_by_name_or_read_as_it_was(
    kind: str, times: int, sound: Path, tmp_path: Path
) -> None:
    expected = READ[kind](shutil.copytree(sound / kind, tmp_path / "sound"))
    draw = random.Random(kind)
    refused = 0
    for n in range(times):
        folder = shutil.copytree(sound / kind, tmp_path / str(n))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        how = damage(draw.choice(files), draw)
        try:
            found = READ[kind](folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error) or "the update" in str(error), f"{how}: {error}"  # noqa: PT017
            refused += 1
        else:  # zeros where zeros were
            assert found.keys() == expected.keys(), how
            assert all(torch.equal(found[key], expected[key]) for key in expected), how
        shutil.rmtree(folder)
    assert refused > 0.8 * times


@pytest.mark.parametrize(
    "times", [12, pytest.param(520, marks=pytest.mark.exhaustive)], ids=["sample", "all"]
)
def test_a_damaged_header_of_safetensors_is_refused_by_name(
    times: int, sound: Path, tmp_path: Path
) -> None:
    """A bit of a weight that flipped cannot be seen in such a file, its header can."""
    draw = random.Random(0)
    content = (sound / "model" / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    expected = Checkpoint((sound / "model" / WEIGHTS,))
    refused = 0
    for _ in range(times):
        path = tmp_path / WEIGHTS
        if draw.random() < 0.5:
            path.write_bytes(content[: draw.randrange(len(content))])
        else:
            changed = bytearray(content)
            changed[draw.randrange(header)] ^= 1 << draw.randrange(8)
            path.write_bytes(bytes(changed))
        try:
            found = Checkpoint((path,))
            tensors = found.read(found.names)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
        else:  # another name of a tensor, which whoever loads it misses
            assert len(tensors) == len(expected.names)
    assert refused > 0.5 * times
