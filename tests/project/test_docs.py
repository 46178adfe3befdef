"""What the pages say can be pasted: every code block is run, or its commands are parsed."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pages
import pytest
import tiny_chat
import torch
import typer
from commands import SHARES, call, commands
from pages import ROOT, Block, blocks
from transformers import LlamaForCausalLM

import ssah
from ssah.cli import app
from ssah.data import load_requests, load_rows, make_loader
from ssah.groups import UnitGroups
from ssah.models import load_model

pytestmark = pytest.mark.xdist_group("docs")  # the world of the pages is made once

FOLDERS = ("docs", *(f"docs/{name}" for name in ("concepts", "reference", "training", "tutorials")))
PAGES = [
    "README.md",
    *sorted(f"{folder}/{path.name}" for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md")),
]
# Commands that were run for hours on real models: they are parsed.
RESULTS = sorted(f"docs/results/{path.name}" for path in ROOT.glob("docs/results/*.md"))
PARSED = ["csrc/README.md", "CONTRIBUTING.md", *RESULTS]
# They measure how long things take, or train for a given time; or they compare two models, which
# are one here. Tests of their own run them.
TIMED = {("demo",), ("bench",), ("diagnose",)}
# They train or measure a dozen models, tiny ones here. `make test-all` runs them.
STUDIES = {
    ("scan",),
    ("stability",),
    ("study", "budget"),
    ("study", "freeze"),
    ("compare",),
    ("protect",),
    ("check",),
}
# How many blocks of a page are not run. Each says why; a new one is counted here.
NOT_RUN = {
    "README.md": 1,
    "docs/categories.md": 1,
    "docs/cuda.md": 1,
    "docs/evaluation.md": 3,
    "docs/gpu.md": 2,
    "docs/installing.md": 3,
    "docs/large_models.md": 2,
    "docs/operators.md": 2,
    "docs/quantised.md": 1,
    "docs/scaling.md": 2,
    "docs/tools.md": 6,
    "docs/training/fsdp2.md": 3,
    "docs/training/lora.md": 1,
    "docs/training/trl.md": 1,
    "docs/tutorials/operators_elsewhere.md": 1,
    "docs/versions.md": 1,
}
# What the pages call their models. One that is named like a hub id is read in the place of the hub.
MODELS = (
    "smollm2",
    "runs/aligned",
    "meta-llama/Llama-2-7b-chat-hf",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
)
# They use packages that a user may lack, and so may a machine that runs the tests.
PACKAGES = {
    "docs/tools.md": ("gguf", "lm_eval"),
    **{f"docs/training/{name}.md": ("trl",) for name in ("sft", "dpo", "grpo")},
}
# They need neither model nor groups: all that they use is in their own blocks.
WHOLE = {
    "README.md",
    "docs/operators.md",
    "docs/training/your_stack.md",
    "docs/tutorials/operators_elsewhere.md",
}
# Options of other programs that the pages name.
OTHERS = {"--help", "--no-build-isolation", "--no-deps", "--nproc-per-node", "--kind"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name: models (one tiny one, many names), groups, rows."""
    folder = tmp_path_factory.mktemp("pages")
    config = tiny_chat.model().config
    config.intermediate_size = 160  # 384 units: 0.2 %, the smallest share of a scan, is one
    model, tokenizer = LlamaForCausalLM(config), tiny_chat.tokenizer()
    with torch.no_grad():  # it ends most answers after a few tokens: nobody reads all 64
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 4
    tokenizer.chat_template += "{% if enable_thinking is false %} {% endif %}"  # it must be read
    for name in MODELS:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    _write_rows(folder)
    for name in ("safety", "utility"):
        data = ("--data", f"builtin:{name}", "--limit", 12)
        call("attribute", folder / "smollm2", *data, "--out", folder / "runs" / name)
    scores = (folder / "runs" / "safety", folder / "runs" / "utility")
    for kind, name in (("zscore", "groups"), ("rank", "groups_tuned")):
        call("classify", *scores, *SHARES, "--normalize", kind, "--out", folder / "runs" / name)
    both = (folder / "runs" / "groups", folder / "runs" / "groups_tuned")
    call("transfer", *both, "--out", folder / "runs" / "transferred")  # a run, for the report
    return folder


def _write_rows(folder: Path) -> None:
    """Files of a few short rows each, disjoint where one is trained or scored on."""
    refusals, answers = list(load_rows("builtin:safety")), list(load_rows("builtin:utility"))
    requests = list(load_rows("builtin:safety_eval"))
    for name, rows in {
        "refusals.jsonl": refusals[:8],
        "answers.jsonl": answers[:8],
        "answers_eval.jsonl": answers[8:12],
        "fresh.jsonl": answers[12:16],
        "task.jsonl": answers[16:24],
        "held_out.jsonl": answers[24:28],
        "gsm8k.jsonl": answers[28:32],
    }.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("requests.txt", "harmful.txt"):
        (folder / name).write_text("".join(row["prompt"] + "\n" for row in requests[:4]))
    _write_asked(folder, requests)
    alpaca = [{"instruction": row["prompt"], "output": row["completion"]} for row in answers[:4]]
    alpaca.append({"instruction": "", "output": ""})  # what --skip-invalid is for
    (folder / "alpaca_data.json").write_text(json.dumps(alpaca))
    with (folder / "harmful_behaviors.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["goal", "target"], *([row["prompt"], "Sure"] for row in requests[:4])])


def _write_asked(folder: Path, requests: list[Any]) -> None:
    """Files in the form of SALAD-Bench and CoSA; the requests are the built-in ones."""
    path = {"1-category": "O1", "2-category": "T1", "3-category": "S1"}
    base = [
        {"qid": number, "question": row["prompt"], "source": source, **path}
        for number, (row, source) in enumerate(
            zip(requests[:4], ["GPTFuzzer", "AdvBench", "DAN", "DAN"], strict=True)
        )
    ]
    base[2]["3-category"] = "S2"
    (folder / "base_set.json").write_text(json.dumps(base))
    question = {"mcq": "Which is a drink? A. tea; B. bread", "choices": "A. tea; B. bread"}
    mcq = [{**question, "baseq": "What is tea?", "gt": "A", **path}]
    (folder / "mcq_set.json").write_text(json.dumps(mcq))
    policies = [
        {"prompt": "Describe a fight.", "system_prompt": text, "allowed": allowed}
        for text, allowed in (("Violence is fine.", True), ("No violence.", False))
    ]
    (folder / "policies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in policies))


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a copy of what was made."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # A hub id that is none of MODELS fails at once, whether there is a network or not.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def names_of(page: str) -> dict[str, Any]:
    """What a page need not say before its first block."""
    # A warning that a name is deprecated is an error, as it is in the library's own files.
    own = {"__name__": "ssah.page"}
    if page in WHOLE:
        return own
    model, tokenizer = load_model("./smollm2")
    groups = UnitGroups.load("runs/groups")
    return own | {
        "torch": torch,
        "ssah": ssah,
        "model": model,
        "tokenizer": tokenizer,
        "groups": groups,
        "units": groups["scu"],
        "loader": make_loader("builtin:utility_eval", tokenizer, limit=4),
        "requests": list(load_requests("harmful.txt")),
    }


# ------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_as_pasted(page: str, here: Path) -> None:
    for package in PACKAGES.get(page, ()):
        pytest.importorskip(package)
    names = _run(page, left_out=TIMED | STUDIES)
    if page == "README.md":
        assert len(names["groups"]["scu"]) > 0
        assert names["plan"].closed
        assert names["trainer"].state.global_step == 10
    if page == "docs/operators.md":
        x = names["x"].flatten(0, 1).double()
        torch.testing.assert_close(names["variance"], x.var(0), rtol=1e-5, atol=0)
        assert names["weight"][0].ne(names["weight"].detach()[3]).any()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "page",
    [
        "docs/experiments.md",
        "docs/compare.md",
        "docs/protect.md",
        "docs/tutorials/compare_methods.md",
        "docs/tutorials/keep_refusals.md",
    ],
)
def test_studies_run_as_pasted(page: str, here: Path) -> None:
    _run(page, left_out=TIMED)


def _run(page: str, left_out: set[tuple[str, ...]]) -> dict[str, Any]:
    """Run a page from its first block to its last, and give the names that its Python leaves."""
    names = names_of(page)
    for block in blocks(page):
        if block.language in pages.SHOWN:
            continue
        if block.language == "bash":
            _run_commands(block, left_out)
        elif block.language == "python" and block.reason is None:
            pages.run_python(block, names)
        elif block.language == "python":
            pages.check_python(block)
        elif block.language == "yaml":
            pages.write_file(block)
        else:
            assert block.reason is not None, f"{block}: {block.language!r} is not run; say why"
    return names


def _run_commands(block: Block, left_out: set[tuple[str, ...]]) -> None:
    for words in pages.commands(block):
        command = pages.check_command(words)
        if command is None or words[0] != "ssah":  # of another program, or under torchrun
            assert block.reason is not None, f"{block}: {words} is not run; say why"
        elif block.reason is None and command not in left_out:
            pages.run_command(words)


@pytest.mark.parametrize("page", PARSED)
def test_commands_exist_and_take_their_options(page: str, here: Path) -> None:
    shells = [block for block in blocks(page) if block.language == "bash"]
    assert shells
    for block in shells:
        for words in pages.commands(block):
            pages.check_command(words)


def test_blocks_that_are_not_run_say_why() -> None:
    counted: dict[str, int] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.reason is not None:
                assert len(block.reason.split()) >= 3, f"{block}: give the reason in a few words"
                counted[page] = counted.get(page, 0) + 1
    assert counted == NOT_RUN


def test_every_block_is_found() -> None:
    for page in [*PAGES, *PARSED]:
        text = (ROOT / page).read_text(encoding="utf-8")
        fences = re.findall(r"^ *```", text, flags=re.MULTILINE)
        assert len(fences) == 2 * len(list(blocks(page))), page


def test_options_in_the_text_exist() -> None:
    known = set(OTHERS)
    for _, command in commands(typer.main.get_command(app)):
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    for script in ROOT.glob("benchmarks/*.py"):
        known |= set(re.findall(r'"(--[a-z0-9-]+)"', script.read_text(encoding="utf-8")))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for code in re.findall(r"`([^`\n]+)`", text):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code):
                assert option in known, f"{page}: no command takes {option}"


def test_every_link_between_pages_leads_to_a_heading() -> None:
    for page in [*ROOT.glob("*.md"), ROOT / "csrc" / "README.md", *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page}: {link}"
            if anchor:
                assert anchor in _anchors(target), f"{page}: {link}"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}
