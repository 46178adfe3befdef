"""A real launcher: the command under torchrun, then a script of accelerate's in its processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import assert_close

import ssah
from ssah.attribution import Attribution
from ssah.data import make_loader
from ssah.models import load_model

SCRIPT = """
import runpy, sys

folder, model, *options = sys.argv[1:]
sys.argv = ["ssah", "attribute", model, *options, "--out", folder + "/scores"]
try:
    runpy.run_module("ssah.cli", run_name="__main__")
except SystemExit as end:
    assert end.code == 0

import accelerate, torch
import ssah
from ssah.data import make_loader
from ssah.distributed import deal
from ssah.models.loading import load_model

assert not torch.distributed.is_initialized()
# The launcher's store still has the addresses of the command's group: this one meets in a file.
meeting = accelerate.InitProcessGroupKwargs(init_method=f"file://{folder}/store")
accelerator = accelerate.Accelerator(cpu=True, kwargs_handlers=[meeting])
model, tokenizer = load_model(model, device="cpu")
loader = make_loader("builtin:safety[0:12]", tokenizer, batch_size=4)
scores = ssah.attribute(model, deal(loader))
scores.save(f"{folder}/rank-{accelerator.process_index}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.exhaustive  # `test_command_under_a_launcher` forks what is launched here
def test_launched_processes_score_what_one_process_scores(
    tiny_chat_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(str(tiny_chat_folder), device="cpu")
    one = ssah.attribute(model, make_loader("builtin:safety[0:12]", tokenizer, batch_size=4))
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ("--data", "builtin:safety[0:12]", "--batch-size", "4", "--device", "cpu")
    found = subprocess.run(
        [sys.executable, *launcher, tmp_path / "script.py", tmp_path, tiny_chat_folder, *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    for name in ("scores", "rank-0", "rank-1"):
        assert_close(Attribution.load(tmp_path / name, model), one, 1e-12)
