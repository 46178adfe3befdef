"""``ssah attribute``, killed at random moments: the same command goes on to the same bits.

Writes a random checkpoint, scores it once undisturbed, and then over and over: each run gets a
SIGKILL at a random moment of its scoring, every fourth one as soon as a file is half written after
that moment, and the same command begins again until it ends by itself. Every tensor of each result
that came about so is compared with the undisturbed one, bit for bit. Both ways: in memory, and
streamed.

    python benchmarks/bench_kills.py --kills 20 --out bench_out/kills.json

With ``--fork`` the runs are children of the script, which need not read Python's modules anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import tiny_chat

from benchmarks import common
from ssah.cli import app
from ssah.storage import META, load_tensors

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"in memory": ("--save-every", "0.05"), "streamed": ("--stream",)}
_AIM_EVERY = 4  # of the kills, one waits for a file that is being written
_PATIENCE = 600.0  # seconds that anything may take
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
Begin = Callable[[Path], int]


def write_checkpoint(folder: Path) -> None:
    """A Llama of 8 layers and 5 M parameters, with the tokenizer of the tests."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=800,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_chat.tokenizer().save_pretrained(folder)


def ended(pid: int) -> bool:
    """Whether a child has ended; it must not have failed."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if found and status:
        raise RuntimeError(f"a run ended with the status {status}, must have ended well")
    return bool(found)


def wait_for(condition: Callable[[], Any], pid: int, every: float = 5e-3) -> bool:
    """Look ``every`` so many seconds until ``condition`` is true; False: the child has ended."""
    limit = time.monotonic() + _PATIENCE
    while not condition():
        if ended(pid):
            return False
        if time.monotonic() > limit:
            raise TimeoutError(f"waited {_PATIENCE:.0f} seconds for a run in vain")
        time.sleep(every)
    return True


def half_written(out: Path) -> bool:
    """Whether a file is being written now, or was when the writer was killed."""
    # Passes over folders that go meanwhile, unlike rglob.
    return any(name.endswith(".tmp") for _, _, names in os.walk(out) for name in names)


def kept(out: Path) -> int:
    """Batches or layers that the next run need not do again."""
    parts = list((out / "unfinished").glob(f"*/{META}"))
    reached = [json.loads(part.read_text())["reached"] for part in parts]
    return sum(each.get("batches", 1) for each in reached)


def disturb(
    begin: Begin, out: Path, span: float, kills: int, draw: random.Random
) -> list[dict[str, Any]]:
    """Kill and begin again until a run ends by itself; what each kill hit.

    Args:
        begin: starts the command with its result in a folder, as a child; its process id.
        out: that folder.
        span: seconds of scoring, within which the moments are drawn.
        kills: the most; every fourth before the last one waits for a half-written file.
        draw: of the moments.
    """
    found: list[dict[str, Any]] = []
    while True:
        pid, before = begin(out), kept(out)
        if len(found) == kills:
            wait_for(lambda: False, pid)
            return found
        # Before it has a folder it reads Python's modules and the model: nothing to lose.
        if not wait_for((out / "unfinished").is_dir, pid):
            return found
        moment = time.monotonic() + draw.uniform(0, span)
        aimed = (kills - len(found)) % _AIM_EVERY == 0
        if not (
            wait_for(lambda moment=moment: time.monotonic() >= moment, pid)
            and (not aimed or wait_for(lambda: half_written(out), pid, every=1e-4))
        ):
            return found
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found.append({"went_on_after": before, "kept": kept(out), "in_write": half_written(out)})


def same_bits(one: Path, other: Path) -> bool:
    """Whether two results are the same in every bit of every tensor, and in what is said of them.

    ``ssah`` writes doubles alone, which are compared as integers.
    """
    (tensors, about), (others, about_other) = load_tensors(one), load_tensors(other)
    return (
        about == about_other
        and tensors.keys() == others.keys()
        and all(
            torch.equal(tensor.view(torch.int64), others[name].view(torch.int64))
            for name, tensor in tensors.items()
        )
    )


def measure(begin: Begin, folder: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Rounds of :func:`disturb` until there were ``kills``.

    Args:
        begin: as of :func:`disturb`.
        folder: for the results.
        kills: exactly as many.
        draw: of the moments.
    """
    whole = folder / "undisturbed"
    pid = begin(whole)
    wait_for((whole / "unfinished").is_dir, pid)
    start = time.monotonic()
    wait_for(lambda: False, pid)
    span = time.monotonic() - start
    rounds: list[dict[str, Any]] = []
    while (left := kills - sum(len(each["kills"]) for each in rounds)) > 0:
        out = folder / f"round-{len(rounds)}"
        found = disturb(begin, out, span, left, draw)
        rest = [str(path.relative_to(out)) for path in out.rglob("*unfinished*")]
        rounds.append({"kills": found, "same_bits": same_bits(out, whole), "left_behind": rest})
        shutil.rmtree(out)
    return {"seconds_of_scoring": span, "rounds": rounds}


def spawn(way: str, model: Path, log: Path) -> Begin:
    """Starts the command as a user does; what it prints is added to ``log``."""

    def begin(out: Path) -> int:
        command = [sys.executable, "-m", "ssah.cli", *arguments(way, model, out)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        redirect = [(os.POSIX_SPAWN_OPEN, output, str(log), _APPEND, 0o644) for output in (1, 2)]
        return os.posix_spawn(sys.executable, command, environment, file_actions=redirect)

    return begin


def fork(way: str, model: Path, log: Path) -> Begin:
    """Starts it in a copy of this process, which must not have run more than one thread."""

    def begin(out: Path) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for output in (1, 2):
                    os.dup2(os.open(log, _APPEND, 0o644), output)
                app(arguments(way, model, out), standalone_mode=False)
                code = 0
            finally:
                os._exit(code)
        return child

    return begin


def arguments(way: str, model: Path, out: Path) -> list[str]:
    """Of the command line."""
    data = ["--data", "builtin:utility", "--batch-size", "4"]
    return ["attribute", str(model), *data, "--out", str(out), *WAYS[way]]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="Runs that were killed, beside one that was not")
    columns = ("way", "scoring", "kills", "in a write", "went on after", "rounds", "same bits")
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        kills = [kill for each in row["rounds"] for kill in each["kills"]]
        table.add_row(
            row["way"],
            f"{row['seconds_of_scoring']:.1f} s",
            str(len(kills)),
            str(sum(kill["in_write"] for kill in kills)),
            " ".join(str(kill["kept"]) for kill in kills),
            str(len(row["rounds"])),
            f"{sum(each['same_bits'] for each in row['rounds'])} of {len(row['rounds'])}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=20, help="Of each way.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--out", type=Path, default=Path("bench_out/kills.json"))
    parser.add_argument("--fork", action="store_true", help="Do not begin with a new interpreter.")
    options = parser.parse_args()
    torch.set_num_threads(1)  # before a fork
    draw, rows = random.Random(options.seed), []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="ssah-") as scratch:
        model = Path(scratch) / "model"
        write_checkpoint(model)
        for way in WAYS:
            folder = Path(scratch) / way.replace(" ", "-")
            folder.mkdir()
            log = options.out.with_suffix(".log").resolve()
            begin = (fork if options.fork else spawn)(way, model, log)
            found = measure(begin, folder, options.kills, draw)
            rows.append({"way": way, **found})
            common.write(options.out, "kills", rows)
    show(rows)
    wrong = [each for row in rows for each in row["rounds"] if not each["same_bits"]]
    if wrong:
        sys.exit(f"{len(wrong)} results are others than that of the undisturbed run")


if __name__ == "__main__":
    main()
