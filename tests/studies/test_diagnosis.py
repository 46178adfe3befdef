"""The four views of what alignment changed, against loops; and the study that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import as_json, call, fails
from tuned import pair, tuned_from

from ssah.data import load_rows, make_loader
from ssah.deltas.subspaces import Gram, column_overlaps
from ssah.evaluation import input_gradient_norms, refusal_margins, utility_loss
from ssah.models import load_model
from ssah.representations import represent, separation

SMALL = ("--safety", "builtin:safety[0:6]", "--utility", "builtin:utility[0:8]")
SMALL += ("--requests", "builtin:safety_eval[0:4]", "--utility-eval", "builtin:utility_eval[0:4]")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_chat_folder: Path) -> tuple[Path, Path]:
    """The model before, and one that was trained from it."""
    model, tokenizer = load_model(str(tiny_chat_folder))
    folder = tmp_path_factory.mktemp("aligned")
    tuned_from(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tiny_chat_folder, folder


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_overlaps_are_of_singular_vectors(name: str) -> None:
    base, tuned = pair(name, torch.float64)
    untouched = "layers.0.mlp.up_proj" if name == "llama_tied" else "h.0.mlp.c_fc"
    with torch.no_grad():
        for key, own in tuned.named_parameters():
            if untouched in key:
                own.copy_(base.get_parameter(key))
    grams, expected = {}, {}
    generator = torch.Generator().manual_seed(3)
    for key, module in base.named_modules():
        if type(module).__name__ not in ("Linear", "Conv1D") or key == "lm_head":
            continue
        turned = type(module).__name__ == "Conv1D"
        w = module.weight.T if turned else module.weight
        d = tuned.get_submodule(key).weight
        d = (d.T if turned else d) - w
        x = torch.randn(w.shape[1], 40, generator=generator, dtype=torch.float64)
        grams[key] = Gram(x @ x.T, 40)
        if untouched in key:
            continue
        bases = []
        for matrix in (d.detach(), w.detach()):
            u, s, _ = torch.linalg.svd(matrix)
            rank, energy = 0, 0.0
            while energy < 0.6 * float((s**2).sum()):
                energy += float(s[rank]) ** 2
                rank += 1
            bases.append(u[:, :rank])
        most = torch.linalg.svd(w.detach() @ x).U[:, : bases[0].shape[1]]
        least = min(each.shape[1] for each in bases)
        expected[key] = tuple(
            sum(float(a @ c) ** 2 for a in own.T for c in bases[1].T) / least
            for own in (bases[0], most)
        )
    found = column_overlaps(base, tuned, share=0.6, utility=grams)
    assert found.keys() == expected.keys()
    for key, (value, utility) in expected.items():
        assert found[key].value == pytest.approx(value, abs=1e-9), key
        assert found[key].utility == pytest.approx(utility, abs=1e-7), key
    with pytest.raises(ValueError, match="share is 0"):
        column_overlaps(base, tuned, share=0)


def test_a_diagnosis_is_its_four_views(folders: tuple[Path, Path], tmp_path: Path) -> None:
    before, aligned = folders
    command = ("diagnose", aligned, "--unaligned", before, *SMALL, "--alpha", "1", "--alpha", "1.5")
    found = as_json(*command, "--out", tmp_path / "run")
    models = {
        name: load_model(str(folder), dtype="float32") for name, folder in
        (("base", before), ("aligned", aligned))
    }  # fmt: skip
    tokenizer = models["base"][1]
    harmful, ordinary = (
        make_loader(list(load_rows(f"builtin:{name}"))[:n], tokenizer)
        for name, n in (("safety", 6), ("utility", 8))
    )
    for name, (model, _) in models.items():
        apart = separation(represent(model, harmful), represent(model, ordinary))
        own = found["separation"][name]
        assert own["harmful"]["ratio"] == pytest.approx(apart.ratio[0].tolist(), rel=1e-4)
        assert own["halves"]["chance"] == pytest.approx(1 / 4 + 1 / 4)
        norms = input_gradient_norms(model, harmful)
        assert found["gradients"][name]["harmful"]["mean"] == pytest.approx(
            float(norms.mean()), rel=1e-3
        )
    # Half as far again, in float64 and by hand.
    base, model = models["base"][0], models["aligned"][0]
    with torch.no_grad():
        for own, start in zip(model.parameters(), base.parameters(), strict=True):
            own.copy_(start + 1.5 * (own - start))
    requests = [row["prompt"] for row in load_rows("builtin:safety_eval")][:4]
    answered = make_loader(list(load_rows("builtin:utility_eval"))[:4], tokenizer)
    rows = {(each["change"], each["alpha"]): each for each in found["alphas"]}
    assert list(rows) == [(c, a) for c in ("aligned", "random") for a in (1.0, 1.5)]
    farther = rows["aligned", 1.5]
    margin = float(refusal_margins(model, tokenizer, requests).mean())
    assert farther["refusal_margin"]["mean"] == pytest.approx(margin, abs=1e-4)
    assert farther["utility_loss"] == pytest.approx(utility_loss(model, answered), rel=1e-4)
    assert rows["random", 1.5]["utility_loss"] != pytest.approx(farther["utility_loss"], rel=1e-3)
    assert all(0 <= own[key] <= 1 for own in found["overlap"] for key in ("overlap", "utility"))
    assert (tmp_path / "run" / "diagnosis.png").stat().st_size > 10_000
    # It is not computed again, and is shown for people and in a report.
    shown = call(*command, "--out", tmp_path / "run").output
    assert "What alignment" not in shown
    assert "random subspaces" in shown
    call("report", tmp_path / "run")
    assert "What alignment changed" in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["finished"]


def test_the_random_change_is_as_large_and_elsewhere() -> None:
    from ssah.studies.diagnosis import _randomly_changed

    base, tuned = pair("llama_tied")
    drawn = _randomly_changed(base, tuned, 0)
    assert drawn.lm_head.weight is drawn.model.embed_tokens.weight
    for (name, own), to, start in zip(
        drawn.named_parameters(), tuned.parameters(), base.parameters(), strict=True
    ):
        changes = [(each - start).detach().flatten() for each in (own, to)]
        if not changes[1].any():
            continue
        torch.testing.assert_close(
            changes[0].sort().values, changes[1].sort().values, atol=1e-6, rtol=0
        )
        assert name.endswith("norm.weight") or not torch.allclose(*changes, atol=1e-6)


def test_one_model_twice_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    before, _ = folders
    told = fails("diagnose", before, "--unaligned", before, "--out", tmp_path / "run")
    assert "the aligned model itself" in told
    (tmp_path / "copy").symlink_to(before)
    told = fails("diagnose", before, "--unaligned", tmp_path / "copy", "--out", tmp_path / "run")
    assert "has the weights of the aligned model" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--energy", 0), "energy is 0.0; it must be greater than 0"),
        (("--alpha", "nan"), "alpha is nan"),
        (("--alpha", 1, "--alpha", 1), "each once"),
        (("--utility", "builtin:utility[0:1]"), "it must have at least two"),
    ],
)
def test_what_later_steps_cannot_use_is_refused_first(
    folders: tuple[Path, Path], tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    before, aligned = folders
    out = ("--out", tmp_path / "run")
    assert said in fails("diagnose", aligned, "--unaligned", before, *words, *out)
    assert not (tmp_path / "run").exists()
