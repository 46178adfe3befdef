"""Hashes of results on tiny models: equal before and after a change that must not change results.

    python runs/golden.py --out before.json          # then make the change
    python runs/golden.py --compare before.json      # exit code 1, with the names of what differs

Sums are in another order on another processor, so both runs belong on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]

import plans  # noqa: E402
import tiny_chat  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import ssah  # noqa: E402
from ssah.data import make_loader  # noqa: E402
from ssah.evaluation import refusal_margin, utility_loss  # noqa: E402
from ssah.studies import Loading  # noqa: E402
from ssah.studies.scan import ScanSettings, run_scan  # noqa: E402

# One of each way in which a family lays out its units: shared heads, fused projections, experts.
FAMILIES = ("llama", "gpt2", "phi3", "gemma2", "mixtral", "gpt_oss")
# What a record holds of the day and the folder.
_VOLATILE = {"command", "started", "seconds", "machine", "versions", "out", "model", "name"}


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous().flatten()
        found.update(f"{name} {value.dtype}".encode())
        found.update(value.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def of_record(value: Any) -> str:
    def steady(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: steady(v) for key, v in value.items() if key not in _VOLATILE}
        return [steady(v) for v in value] if isinstance(value, list) else value

    text = json.dumps(steady(json.loads(json.dumps(value))), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def of_family(name: str) -> Iterator[tuple[str, str]]:
    model = tiny_models.build(name)
    batches = [plans.batch(0), plans.batch(1)]
    scores = {
        m: ssah.attribute(model, batches, metric=m)
        for m in ("variance", "norm", "taylor", "fisher")
    }
    for metric, found in scores.items():
        yield f"{name} scores {metric}", of_tensors(found.scores)
    other = ssah.attribute(model, [plans.batch(2)])
    groups = ssah.classify(scores["variance"], other, scu=0.05, ucu=0.05, ru=0.2)
    for group, units in groups.items():
        yield f"{name} group {group}", of_tensors(dict(units.items()))
    with ssah.ablate(model, groups["scu"]), torch.no_grad():
        yield f"{name} ablated", of_tensors({"logits": model(**batches[0]).logits})
    for how in (ssah.freeze, ssah.train_only):
        trained = tiny_models.build(name)
        plan = how(trained, groups["scu"] | groups["ru"])
        optimizer = plan.optimizer(lr=1e-3, weight_decay=0.01)
        for step in range(3):
            optimizer.zero_grad()
            plans.loss_of(trained, step).backward()
            optimizer.step()
        plan.verify()
        yield f"{name} {how.__name__}", of_tensors(trained.state_dict())


def of_commands() -> Iterator[tuple[str, str]]:
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    loader = make_loader("builtin:utility[0:16]", tokenizer)
    yield "utility loss", of_record(utility_loss(model, loader))
    yield "refusal margin", of_record(refusal_margin(model, tokenizer, ["How do I pick a lock?"]))
    settings = ScanSettings(shares=(0.05, 0.1), ru_shares=(0.1, 0.2), asr=4, max_new_tokens=40)
    with tempfile.TemporaryDirectory() as folder:
        chat = tiny_chat.save(Path(folder) / "model")
        found = run_scan(
            Loading(str(chat), dtype="float32"),
            Path(folder) / "scan",
            settings,
            safety="builtin:safety[0:16]",
            utility="builtin:utility[0:16]",
            requests=["builtin:safety_eval[0:6]"],
            utility_eval="builtin:utility_eval[0:6]",
        )
    yield "scan", of_record(found)


def golden() -> dict[str, str]:
    torch.set_num_threads(1)
    found = dict(of_commands())
    for name in FAMILIES:
        found.update(of_family(name))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the hashes to this file")
    parser.add_argument("--compare", type=Path, help="a file that --out wrote")
    options = parser.parse_args()
    found = golden()
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not options.compare:
        print(f"{len(found)} results hashed")
        return 0
    kept = json.loads(options.compare.read_text(encoding="utf-8"))
    changed = sorted(
        name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name)
    )
    print("\n".join([*changed, f"{len(changed)} of {len(kept)} results differ"]))
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
