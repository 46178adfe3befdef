"""Real launchers: the command under torchrun, and a script of accelerate's under it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tiny_chat
from ranks import assert_close

import ssah
from ssah.attribution import Attribution
from ssah.data import make_loader
from ssah.models import load_model

SCRIPT = """
import sys
import accelerate, torch
import ssah
from ssah.data import make_loader
from ssah.distributed import deal
from ssah.models import load_model

folder = sys.argv[1]
accelerator = accelerate.Accelerator(cpu=True)
model, tokenizer = load_model(folder + "/model", device="cpu")
loader = make_loader("builtin:safety[0:12]", tokenizer, batch_size=4)
scores = ssah.attribute(model, deal(loader))
scores.save(f"{folder}/rank-{accelerator.process_index}")
torch.distributed.destroy_process_group()
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_launched_processes_score_what_one_process_scores(tmp_path: Path) -> None:
    tiny_chat.model().save_pretrained(tmp_path / "model")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(str(tmp_path / "model"), device="cpu")
    one = ssah.attribute(model, make_loader("builtin:safety[0:12]", tokenizer, batch_size=4))

    (tmp_path / "script.py").write_text(SCRIPT)
    found = torchrun(str(tmp_path / "script.py"), str(tmp_path))
    assert found.returncode == 0, found.stderr
    for rank in range(2):
        assert_close(Attribution.load(tmp_path / f"rank-{rank}", model), one, 1e-12)

    options = ["--data", "builtin:safety[0:12]", "--batch-size", "4", "--device", "cpu"]
    command = ["-m", "ssah.cli", "attribute", str(tmp_path / "model"), *options]
    found = torchrun(*command, "--out", str(tmp_path / "scores"))
    assert found.returncode == 0, found.stderr
    assert_close(Attribution.load(tmp_path / "scores", model), one, 1e-12)
