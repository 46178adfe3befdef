"""Things on disk that a user may name by mistake, and command lines that name them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEEP = "[" * 100_000
TEXTS = {
    "empty": "",
    "list": "[]",
    "object": "{}",
    "number": "3",
    "cut": '{"model_type": "lla',
    "deep": DEEP,
    "words": "not JSON at all",
}


def break_models(folder: Path, good: Path) -> None:
    """Folders of models, each with one thing wrong."""
    for part in ("config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"):
        if not (good / part).is_file():
            continue
        for how, text in TEXTS.items():
            if part == "tokenizer_config.json" and how == "object":
                continue  # which says nothing, and is right
            broken = folder / f"{part}-{how}"
            shutil.copytree(good, broken)
            (broken / part).write_text(text)
    config = json.loads((good / "config.json").read_text())
    for key, value in (
        ("num_attention_heads", 0),
        ("num_attention_heads", "x"),
        ("num_key_value_heads", 3),
        ("hidden_size", "x"),
        ("hidden_size", -64),
        ("vocab_size", -1),
        ("vocab_size", 5),
        ("num_hidden_layers", 9),
        ("num_hidden_layers", -1),
        ("intermediate_size", 8),
        ("model_type", "unheard-of"),
        ("model_type", 3),
        ("hidden_act", "unheard-of"),
        ("rms_norm_eps", "x"),
    ):
        broken = folder / f"config-{key}-{value}"
        shutil.copytree(good, broken)
        (broken / "config.json").write_text(json.dumps({**config, key: value}))
    cut = folder / "weights-cut"
    shutil.copytree(good, cut)
    content = (good / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    (folder / "nothing-in-it").mkdir()
    (folder / "garbage.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    (folder / "a-file").write_text("x")


def break_rows(folder: Path) -> None:
    """Files of rows, each with one thing wrong."""
    folder.mkdir()
    for how, text in TEXTS.items():
        (folder / f"{how}.jsonl").write_text(text)
    (folder / "no-answer.jsonl").write_text('{"prompt": "w1"}\n')
    (folder / "numbers.jsonl").write_text('{"prompt": 1, "completion": 2}\n')
    (folder / "null.jsonl").write_text('{"prompt": null, "completion": null}\n')
    (folder / "nested.jsonl").write_text('{"messages": [{"role": 3}]}\n')
    (folder / "binary.jsonl").write_bytes(bytes(range(256)))
    (folder / "a-folder.jsonl").mkdir()


def break_results(folder: Path, good: Path) -> None:
    """Folders of a result, each with one thing wrong."""
    for how, text in TEXTS.items():
        broken = folder / f"meta-{how}"
        shutil.copytree(good, broken)
        (broken / "meta.json").write_text(text)
    for how in ("gone", "cut"):
        broken = folder / f"tensors-{how}"
        shutil.copytree(good, broken)
        (file,) = broken.glob("*.safetensors")
        content = file.read_bytes()
        file.unlink()
        if how == "cut":
            file.write_bytes(content[: len(content) // 2])
    (folder / "nothing-in-it").mkdir()
    (folder / "a-file").write_text("x")


NEW = "NEW"  # stands for a folder that is not there yet, of each command line its own

ODD = ("[/x]", "[bold]x[/]", "\x1b]0;x\x07", "a\nb", "x" * 300, "{0}", "%s", "ä ö", "~nobody/x")


@dataclass(frozen=True)
class Line:
    """A command line that must be refused in one line with ``named`` in it."""

    words: tuple[str, ...]
    named: str

    def __str__(self) -> str:
        return " ".join(self.words)


def lines(runs: Path, zoo: Path) -> Iterator[Line]:
    """Command lines, each wrong in one thing.

    Args:
        runs: with ``model``, ``safety``, ``utility`` and ``groups``, all sound.
        zoo: with ``models``, ``rows``, ``scores`` and ``groups``, each thing in it broken.
    """
    model, groups, new = str(runs / "model"), str(runs / "groups"), NEW
    small = ("--limit", "4")
    scored = ("--data", "builtin:safety", *small)
    scanned = ("--safety", "builtin:safety[0:4]", "--utility", "builtin:utility[0:4]")
    scanned += ("--requests", "builtin:safety_eval[0:2]", "--utility-eval", "builtin:utility_eval")
    with_model: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "attribute": (("attribute",), (*scored, "--out", new)),
        "stream": (("attribute",), (*scored, "--stream", "--out", new)),
        "ablate": (("ablate",), ("--groups", groups, "--group", "scu", *small)),
        "finetune": (("finetune",), (*scored, "--freeze", "none", "--out", new)),
        "align": (("align",), (*scored, "--groups", groups, "--out", new)),
        "evaluate": (("evaluate",), ("--out", new)),
        "probe": (("probe",), ("--out", new)),
        "scan": (("scan",), (*scanned, "--out", new)),
        "info": (("info", "--model"), ()),
        "demo": (("demo", "--model"), ("--out", new)),
    }
    broken = sorted(path for path in (zoo / "models").iterdir())
    # Every broken model through one command, and some of them through each.
    for number, (before, after) in enumerate(with_model.values()):
        chosen = broken if not number else broken[number::6]
        for path in chosen:
            if before[0] == "info" and not path.name.startswith("config.json"):
                continue  # which reads the configuration alone
            if path.name.startswith("tokenizer_config.json-object"):
                continue
            name = "depth-2" if path.name == "config-num_hidden_layers--1" else path.name
            yield Line((*before, str(path), *after), name)
        for odd in ODD:
            yield Line((*before, odd, *after), "")
    takes_rows = (
        ("attribute", model, "--out", new, "--data"),
        ("attribute", model, "--stream", "--out", new, "--data"),
        ("finetune", model, "--freeze", "none", "--out", new, "--data"),
        ("ablate", model, "--groups", groups, "--group", "scu", "--utility"),
        ("evaluate", model, "--out", new, "--utility"),
        ("scan", model, *scanned[2:], "--out", new, "--safety"),
    )
    rows = sorted((zoo / "rows").iterdir())
    for number, before in enumerate(takes_rows):
        for path in rows if not number else rows[number::3]:
            yield Line((*before, str(path)), path.name)
        for odd in ("builtin:nothing", "builtin:safety[9999:]", "builtin:safety[a:b]", "", ODD[0]):
            yield Line((*before, odd), "")
    shares = ("--scu", "0.1", "--ucu", "0.1", "--ru", "0.2", "--out", new)
    for path in (*sorted((zoo / "scores").iterdir()), zoo / "nowhere", Path(groups)):
        yield Line(("classify", str(path), str(runs / "utility"), *shares), path.name)
        yield Line(("classify", str(runs / "safety"), str(path), *shares), path.name)
    takes_groups = (
        ("ablate", model, "--group", "scu", *small, "--groups"),
        ("finetune", model, *scored, "--freeze", "scu", "--out", new, "--groups"),
        ("align", model, *scored, "--out", new, "--groups"),
        ("transfer", groups),
    )
    for before in takes_groups:
        for path in (*sorted((zoo / "groups").iterdir()), zoo / "nowhere", runs / "safety"):
            yield Line((*before, str(path)), path.name)
    for path in sorted((zoo / "groups").iterdir()):
        yield Line(("evaluate", model, "--out", new, "--ablate", f"{path}:scu"), path.name)
    a_file = str(zoo / "models" / "a-file")
    writes = (
        ("attribute", model, *scored),
        ("attribute", model, *scored, "--stream"),
        ("finetune", model, *scored, "--freeze", "none"),
        ("align", model, *scored, "--groups", groups),
        ("evaluate", model),
        ("probe", model),
        ("scan", model, *scanned),
        ("stability", model, *scanned[:4]),
        ("classify", str(runs / "safety"), str(runs / "utility"), *shares[:-2]),
        ("transfer", groups, groups),
        ("demo", "--model", model),
    )
    for before in writes:
        for out in (a_file, f"{a_file}/below", "/proc/nowhere/below", f"{a_file}/[/x]"):
            yield Line((*before, "--out", out), out.removesuffix("/below").removesuffix("/[/x]"))
    tuned = ("finetune", model, *scored, "--out", new, "--freeze")
    wrong = (
        (("classify", str(runs / "safety"), str(runs / "utility"), *shares, "--scu", "0.95"), "1"),
        (
            (*tuned, "scu:x", "--groups", groups),
            "scu",
        ),
        ((*tuned, "abc", "--groups", groups), "abc"),
        ((*tuned, "none", "--lr", "nan"), "lr"),
        ((*tuned, "none", "--lr", "inf"), "lr"),
        (
            (*tuned, "none", "--epochs", "-1"),
            "epochs",
        ),
        ((*tuned, "none", "--seed", str(2**64)), ""),
        (("evaluate", model, "--out", new, "--judge", "nobody"), "nobody"),
        (("evaluate", model, "--out", new, "--judge", "[/x]"), "[/x]"),
        (("evaluate", model, "--out", new, "--judge", a_file), "a-file"),
        (("evaluate", model, "--out", new, "--judge", "python:no.such"), "no"),
        (("evaluate", model, "--out", new, "--level", "2"), "level"),
        (("evaluate", model, "--out", new, "--ablate", "x"), "x"),
        (("evaluate", model, "--out", new, "--ablate", f"{groups}:abc"), "abc"),
        (("evaluate", model, "--out", new, "--ablate", f"{groups}:ru:2"), "2"),
        (("evaluate", model, "--out", new, "--requests", str(zoo / "nowhere.txt")), "nowhere.txt"),
        (("evaluate", model, "--out", new, "--requests", str(zoo)), ""),
        (("probe", model, "--out", new, "--beside", model), "beside"),
        (("probe", model, "--out", new, "--requests", "builtin:safety_eval[0:1]"), ""),
        (("report", str(zoo / "nowhere")), "nowhere"),
        (("report", a_file), "a-file"),
        (("report", str(runs / "groups")), "groups"),
        (("attribute", model, *scored, "--out", new, "--device", "abacus"), "abacus"),
        (("attribute", model, *scored, "--out", new, "--device", "cuda:99"), "cuda:99"),
        (("attribute", model, *scored, "--out", new, "--max-length", "2"), ""),
        (("attribute", model, *scored, "--out", new, "--packed"), "packed"),
        (("attribute", model, *scored, "--out", new, "--all-experts"), "all_experts"),
        (("attribute", model, *scored, "--out", new, "--stream", "--metric", "taylor"), "taylor"),
    )
    for words, named in wrong:
        yield Line(words, named)
