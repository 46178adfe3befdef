"""Models that do not fit in memory: tensors are read one at a time, and little else is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from tuned import pair, saved, tuned_from

from ssah import deltas
from ssah.models import Checkpoint

# Grows from a process that has imported everything to the peak of three edits, in KiB.
_MEASURE = """
import json, sys
from pathlib import Path
from ssah import deltas
def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
base, first, second, out = sys.argv[1:]
deltas.rewind(base, first, "model.norm", out=out + "0")
before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
deltas.interpolate(base, first, 0.5, out=out + "1")
deltas.merge(base, [first, second], how="ties", share=0.2, out=out + "2")
deltas.keep(base, first, 0.1, by="random", rescale=True, out=out + "3")
print(json.dumps(kib("VmHWM") - before))
"""


def test_one_tensor_of_each_model_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair("llama")
    models = (base, tuned, tuned_from(base, seed=2))
    folders = [saved(each, tmp_path / str(i)) for i, each in enumerate(models)]
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, read = 0, Checkpoint.read

    def watch(self: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        nonlocal most
        found = read(self, names)
        for tensor in found.values():
            alive.add(tensor)
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(Checkpoint, "read", watch)
    deltas.merge(folders[0], folders[1:], how="ties", share=0.2, out=tmp_path / "out")
    assert most == 3
    assert not alive


@pytest.mark.exhaustive
def test_the_peak_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Three checkpoints of 135 MB, whose largest tensor has 16 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        vocab_size=4000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=8,
    )
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        folders.append(saved(LlamaForCausalLM(config), tmp_path / str(seed), "60MB"))
    command = [sys.executable, "-c", _MEASURE, *folders, str(tmp_path / "out")]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    grown = json.loads(output.splitlines()[-1])
    assert grown < 120 * 1024, f"{grown / 1024:.0f} MiB"
