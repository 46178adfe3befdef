"""An evaluation of several ablated models: together, beside one after the other as before.

Two things are compared, each in turn within one process, on the same requests and selections:

* ``together``: what ``ssah evaluate`` does: all arms in shared batches, the common beginning of
  prompts once, one pass of the intact model over the answers of the others; margins with a request
  run once for both openings, and one pass for loss and KL.
* ``one by one``: each arm by itself inside ``ssah.ablate``, with ``generate`` of transformers in
  batches of 16, and a pass of the intact model over prompts and answers of each arm; margins and
  losses of whole rows, and no KL, as before these were shared.

The ratio is of all of it; the table has answers (with their coherence) and measures apart. Weights
are random, so that no answer ends early, and no two arms answer alike: the worst case. With
``--ends`` answers end, as those of a model that refuses do. An answer that repeats itself would be
called incoherent without a pass of the model, which is switched off here on both sides. With
``--model`` a real model answers as it does.

    python benchmarks/bench_evaluate.py --out bench_out/evaluate.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ssah
from benchmarks import common
from benchmarks.chat import BATCH, UTILITY, random_model, row_nats, whole_rows
from ssah.data import load_requests, make_loader
from ssah.evaluation import Coherence, divergences, judge, judged_answers, prompts, refusal_margins
from ssah.evaluation.attacks.attack import counting
from ssah.evaluation.generating import decoding
from ssah.evaluation.generating.generation import stop_tokens
from ssah.interventions import Zero
from ssah.models import load_model
from ssah.units import UnitSet, find_modules

LIMIT = 1 / 3  # of the time one by one, for four arms
SHARE = 0.01  # of all units, in each arm


def one_by_one(model: Any, tokenizer: Any, requests: list[str], selections: Any, new: int) -> Any:
    """New tokens of every arm, ``[arms][requests]``, the answers scored by the intact model."""
    encoded, stops = prompts(tokenizer, requests), stop_tokens(model, tokenizer)
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
    every = []
    for units in selections:
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), BATCH):
            own = order[start : start + BATCH]
            width = max(len(encoded[i]) for i in own)
            gaps = [width - len(encoded[i]) for i in own]
            pairs = list(zip(own, gaps, strict=True))
            ids = torch.tensor([[0] * gap + encoded[i] for i, gap in pairs])  # [rows, width]
            mask = torch.tensor([[0] * gap + [1] * len(encoded[i]) for i, gap in pairs])
            with torch.inference_mode(), ssah.intervene(model, *units):
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    logits_to_keep=torch.tensor([-1]),
                    **options,
                )
            found |= zip(own, output[:, width:].tolist(), strict=True)
        rows = [found[i] for i in range(len(encoded))]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        said = [tokenizer(text, add_special_tokens=False)["input_ids"][:64] for text in texts]
        examples: list[Any] = [
            {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}
            for prompt, ids in zip(encoded, said, strict=True)
        ]
        row_nats(model, tokenizer, examples)
        every.append([ids[: _end(ids, stops)] for ids in rows])
    return every


def _end(ids: list[int], stops: list[int]) -> int:
    """Tokens up to the one that ends the row."""
    return next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))


def identical(model: Any, tokenizer: Any, requests: list[str], drawn: Any, exact: Any) -> float:
    """Share of the tokens of ``exact``, ``[arms][requests]``, that arms in shared batches give."""
    encoded, stops = prompts(tokenizer, requests), stop_tokens(model, tokenizer)
    new = max(len(ids) for rows in exact for ids in rows)
    jobs = [(arm, i) for i in range(len(encoded)) for arm in range(len(exact))]
    same = 0
    with decoding.greedy(model, tokenizer, stops, new), ssah.arms(model, [None, *drawn]) as run:
        for start in range(0, len(jobs), 64):
            own = jobs[start : start + 64]
            rows = [encoded[i] for _, i in own]
            found = decoding.decode(model, rows, stops, new, run, [arm for arm, _ in own])
            for (arm, i), ids in zip(own, found, strict=True):
                same += sum(a == b for a, b in zip(ids, exact[arm][i], strict=False))
    return same / sum(len(ids) for rows in exact for ids in rows)


def together(model: Any, tokenizer: Any, requests: list[str], selections: Any, new: int) -> Any:
    """What is kept of every arm's answers."""
    scorer = Coherence(model, tokenizer, max_nll=100.0, max_repeated=1.0)
    return judged_answers(
        model,
        tokenizer,
        requests,
        [judge("qi2023")],
        scorer,
        counting(lambda _: None),
        selections=selections,
        max_new_tokens=new,
        batch_size=BATCH,
    )


def measured_together(model: Any, tokenizer: Any, requests: list[str], selections: Any) -> None:
    """Margins, losses and KL of every arm, as ``ssah evaluate`` measures them."""
    for units in selections:
        with nullcontext() if units is None else ssah.ablate(model, units):
            refusal_margins(model, tokenizer, requests, batch_size=BATCH)
    divergences(model, make_loader(UTILITY, tokenizer, batch_size=BATCH), selections)


def measured_one_by_one(model: Any, tokenizer: Any, requests: list[str], selections: Any) -> None:
    """Margins and losses of every arm, of whole rows."""
    for zeroed in selections:
        with ssah.intervene(model, *zeroed):
            whole_rows(model, tokenizer, requests)


def measure(arms: int, options: argparse.Namespace) -> dict[str, Any]:
    """What ``arms`` arms take, in this process: the first is the intact model."""
    if options.model is None:
        model, tokenizer = random_model(options.width, options.layers)
        model.to(getattr(torch, options.dtype))
        if options.ends is not None:
            model.generation_config.eos_token_id = list(range(0, 800, options.ends))
    else:
        model, tokenizer = load_model(options.model, dtype=options.dtype)
    sizes = {name: module.n_units for name, module in find_modules(model).items()}
    drawn = [UnitSet.random(int(SHARE * sum(sizes.values())), sizes, i) for i in range(arms - 1)]
    requests = load_requests("builtin:safety")[: options.requests]
    given = (model, tokenizer, requests)
    zeroed = [(), *[(Zero(units),) for units in drawn]]
    held = common.kibibytes("VmRSS")
    calls = {
        ("measures", "together"): lambda: measured_together(*given, [None, *drawn]),
        ("measures", "one_by_one"): lambda: measured_one_by_one(*given, zeroed),
        ("answers", "together"): lambda: together(*given, [None, *drawn], options.new),
        ("answers", "one_by_one"): lambda: one_by_one(*given, zeroed, options.new),
    }
    # In turn, in seconds of the processor as well: other work on the machine counts in the others.
    times: dict[tuple[str, str], list[tuple[float, float]]] = {name: [] for name in calls}
    exact: Any = None
    for _ in range(options.repeats):
        for name, call in calls.items():
            begun = time.perf_counter(), time.process_time()
            exact = call()  # of the last one, one by one
            times[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    seconds: dict[str, dict[str, dict[str, float]]] = {"together": {}, "one_by_one": {}}
    for (part, way), each in times.items():
        wall, processor = (statistics.median(own) for own in zip(*each, strict=True))
        seconds[way][part] = {"wall": wall, "processor": processor}
    whole = {way: sum(own["processor"] for own in parts.values()) for way, parts in seconds.items()}
    encoded = prompts(tokenizer, requests)
    return {
        "arms": arms,
        "model": options.model or f"random, {options.layers} layers of width {options.width}",
        "requests": len(requests),
        "dtype": options.dtype,
        "ends": options.ends,
        "identical_tokens": identical(*given, drawn, exact),
        "prompt_tokens": sum(map(len, encoded)) / len(encoded),
        "new_tokens": options.new,
        **seconds,
        "ratio": whole["together"] / whole["one_by_one"],
        "limit": LIMIT if arms == 4 else None,
        "added_bytes": 1024 * (common.kibibytes("VmHWM") - held),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(
        title="An evaluation of several arms, beside one by one before, in seconds of the processor"
    )
    table.add_column("arms", justify="right")
    for column in ("answers", "before", "measures", "before", "ratio", "limit", "same", "added"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["arms"]),
            *(
                f"{row[way][part]['processor']:.1f}"
                for part in ("answers", "measures")
                for way in ("together", "one_by_one")
            ),
            f"{row['ratio']:.2f}",
            "" if row["limit"] is None else f"{row['limit']:.2f}",
            f"{row['identical_tokens']:.2%}",
            f"{row['added_bytes'] / 2**20:.0f} MiB",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("bench_out/evaluate.json"))
    parser.add_argument("--model", help="In place of the random one: as load_model takes it.")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--new", type=int, default=40, help="Tokens of an answer.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ends", type=int, help="One token in so many ends a random answer.")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--each", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="Numbers of arms."
    )
    parser.add_argument("--arms", type=int, help="Measure this number in this process alone.")
    options = parser.parse_args()
    if options.arms is not None:
        print(json.dumps(measure(options.arms, options)))
        return
    passed = ("requests", "new", "layers", "width", "dtype", "repeats")
    given = [word for name in passed for word in (f"--{name}", getattr(options, name))]
    for name in ("model", "ends"):
        if getattr(options, name) is not None:
            given += [f"--{name}", getattr(options, name)]
    rows = [common.in_child(__file__, *given, "--arms", n) for n in options.each]
    common.write(options.out, "evaluate", rows)
    show(rows)


if __name__ == "__main__":
    main()
