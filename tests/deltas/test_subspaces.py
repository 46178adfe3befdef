"""Gram matrices, projections, angles and overlaps, against hooks, loops and draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as processes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IGNORED, build, collate, rows
from torch import Tensor, nn

from ssah.deltas.subspaces import (
    Gram,
    GramPasses,
    Subspace,
    delta_subspace,
    energy,
    gram,
    output_subspace,
    overlap,
    principal_angles,
)
from ssah.distributed import deal


def inputs_by_hand(model: Any, batches: list[dict[str, Tensor]], name: str, counted: Any) -> Tensor:
    """What enters a projection where tokens count, row by row without padding: [tokens, in]."""
    found: list[Tensor] = []
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            own = batch["attention_mask"][i].bool()
            seen: list[Tensor] = []
            hook = model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].detach().clone())
            )
            with torch.no_grad():
                model(input_ids=batch["input_ids"][i][own][None])
            hook.remove()
            found.append(seen[0].flatten(0, -2)[counted(batch, i)[own]].double())
    return torch.cat(found)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("llama_tied", "all"), ("gpt2", "labels"), ("mixtral", "all"), ("gemma3", "labels")],
)
def test_gram_matrices_are_those_of_the_inputs(name: str, tokens: str) -> None:
    model = build(name)
    batches = [collate(rows(seed=1), side="left"), collate(rows((8, 5), seed=2))]
    found = gram(model, batches, tokens=tokens)
    linear = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) or "Conv1D" in str(type(m))
    }
    assert set(found) == {each for each in linear if ".0." in each or ".1." in each}
    mask = {
        "labels": lambda batch, i: batch["labels"][i] != IGNORED,
        "all": lambda batch, i: batch["attention_mask"][i].bool(),
    }[tokens]
    for each in list(found)[:: max(1, len(found) // 5)]:
        x = inputs_by_hand(model, batches, each, mask)
        assert found[each].tokens == len(x)
        expected = sum(torch.outer(row, row) for row in x)
        torch.testing.assert_close(found[each].matrix, expected, rtol=1e-4, atol=1e-4)


def test_what_shares_its_input_shares_its_matrix() -> None:
    model = build("llama")
    found = gram(model, [collate(rows())])
    layer = "model.layers.0"
    q, k, v, o = (found[f"{layer}.self_attn.{leaf}_proj"] for leaf in "qkvo")
    assert q is k
    assert k is v
    assert q is not o
    assert found[f"{layer}.mlp.gate_proj"] is found[f"{layer}.mlp.up_proj"]
    one = gram(model, [collate(rows())], [f"{layer}.self_attn.v_proj"])
    assert one[f"{layer}.self_attn.v_proj"].matrix.equal(v.matrix)


def several(rank: int, n: int, folder: Path) -> None:
    model = build("mixtral")
    batches = processes.batches(5)
    found = gram(model, deal(batches))
    torch.save(
        {name: (each.matrix, each.tokens) for name, each in found.items()}, folder / f"{rank}"
    )
    few = gram(model, batches[:1] if rank else [])  # the first rank has no batch, and no matrix
    alone = gram(model, batches[:1], process_group=None)
    assert all(torch.equal(few[name].matrix, alone[name].matrix) for name in alone)
    with pytest.raises(ValueError, match="the same batches on all 2 ranks"):
        gram(model, batches)
    with pytest.raises(ValueError, match="tokens is 'all' on rank 1"):
        gram(model, processes.batches(2, labels=not rank))
    with pytest.raises(ValueError, match=r"projections is \["):
        gram(model, batches[rank:], [f"model.layers.{rank}.self_attn.v_proj"])
    if rank:  # what a faulty machine computes
        model.model.layers[1].self_attn.v_proj.register_forward_hook(
            lambda *args: args[2] * math.nan
        )
    with pytest.raises(
        FloatingPointError, match=r"layers\.1\.self_attn\.o_proj' is NaN or infinite"
    ):
        gram(model, deal(batches))
    with pytest.raises(ValueError, match=r"is sharded \(fully_shard\)"):
        gram(processes.sharded(n), deal(batches))
    assert len(gram(build("mixtral"), deal(batches))) == len(found)  # still in step


def test_ranks_join_their_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A few rows at a time, so that there are several pieces.
    monkeypatch.setattr("ssah.deltas.subspaces.gram_matrices._GATHERED_AT_ONCE", 500)
    processes.start(several, 2, tmp_path)
    found = [torch.load(tmp_path / f"{rank}") for rank in range(2)]
    one = gram(build("mixtral"), processes.batches(5))
    assert list(found[0]) == list(found[1]) == list(one)
    for name, expected in one.items():
        (first, tokens), (second, _) = (each[name] for each in found)
        assert tokens == expected.tokens
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected.matrix, rtol=1e-9, atol=1e-9)


def test_wrong_calls_of_gram_are_refused_and_leave_no_hook() -> None:
    model = build("llama")
    batch = collate(rows())
    cases: list[tuple[Any, Any, str]] = [
        ([batch], ["model.norm"], r"projections has \['model.norm'\]; it must have names of"),
        ([batch], [], r"projections has \[\]"),
        ([], None, "no token that counts"),
        ([batch], ["lm_head"], "'lm_head' did not run"),
        ([{**batch, "labels": torch.full_like(batch["labels"], IGNORED)}], None, "no token that"),
    ]
    for loader, names, message in cases:
        with pytest.raises(ValueError, match=message):
            gram(model, loader, names)
    with pytest.raises(ValueError, match="tokens is 'some'; it must be one of"):
        gram(model, [batch], tokens="some")
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.v_proj.weight")[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        gram(model, [batch])
    assert not any(module._forward_pre_hooks for module in model.modules())


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 9), st.integers(0, 1000), st.data())
def test_projectors_are_idempotent_and_parts_add_up(n: int, seed: int, data: Any) -> None:
    space = Subspace.random(n, data.draw(st.integers(1, n)), seed)
    p = space.projector
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-12)
    torch.testing.assert_close(p, p.T, rtol=0, atol=1e-12)
    assert float(p.trace()) == pytest.approx(space.rank)
    x = torch.randn(3, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    onto, away = space.onto(x, dim=1), space.away(x, dim=1)
    torch.testing.assert_close(onto + away, x, rtol=0, atol=1e-12)
    expected = torch.from_numpy(np.einsum("ij,bjk->bik", p.numpy(), x.numpy()))
    torch.testing.assert_close(onto, expected, rtol=0, atol=1e-12)


def test_the_worked_examples() -> None:
    diagonal = Subspace.spanned_by(torch.tensor([[1.0], [1.0]]))
    x = torch.tensor([3.0, 1.0])
    torch.testing.assert_close(diagonal.onto(x), torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(diagonal.away(x), torch.tensor([1.0, -1.0]))
    unit = torch.eye(3, dtype=torch.float64)
    a, b = Subspace(unit[:, :2]), Subspace(unit[:, 1:])
    expected = torch.tensor([0.0, math.pi / 2], dtype=torch.float64)
    torch.testing.assert_close(principal_angles(a, b), expected)
    share = overlap(a, b)
    assert (share.value, share.random) == pytest.approx((0.5, 2 / 3))


def test_angles_are_those_of_the_singular_values() -> None:
    a, b = Subspace.random(12, 4, 1), Subspace.random(12, 3, 2)
    cosines = np.linalg.svd(a.basis.numpy().T @ b.basis.numpy(), compute_uv=False)
    angles = principal_angles(a, b)
    assert angles.tolist() == pytest.approx(np.arccos(cosines).tolist())
    assert overlap(a, b).value == pytest.approx(float(np.mean(cosines**2)))


def test_the_controls_are_what_draws_would_give() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    matrix[:, 0] *= 6  # most of it lies in one direction
    fixed, n = Subspace.random(9, 2, seed=7), 700
    drawn = [Subspace.random(9, 3, seed=100 + i) for i in range(n)]
    energies = torch.tensor([energy(matrix, each).value for each in drawn])
    overlaps = torch.tensor([overlap(each, fixed).value for each in drawn])
    for found, share in (
        (energies, energy(matrix, drawn[0])),
        (overlaps, overlap(drawn[0], fixed)),
    ):
        assert abs(float(found.mean()) - share.random) < 4 * share.random_sd / math.sqrt(n)
        assert float(found.std()) == pytest.approx(share.random_sd, rel=0.12)
    utility = Subspace.random(9, 4, seed=5)
    cut = Subspace(utility.basis[:, :3].contiguous())
    assert energy(matrix, drawn[0], utility=utility).utility == energy(matrix, cut).value
    by_hand = sum(float((cut.basis[:, i] @ matrix).square().sum()) for i in range(3))
    assert energy(matrix, cut).value == pytest.approx(by_hand / float(matrix.square().sum()))


def test_output_directions_are_the_singular_vectors_of_w_x() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    space = output_subspace(weight, Gram(x.T @ x, 50), 2)
    u, _, _ = np.linalg.svd(weight.double().numpy() @ x.numpy().T, full_matrices=False)
    expected = Subspace(torch.from_numpy(u[:, :2].copy()))
    assert float(principal_angles(space, expected).max()) < 1e-7
    assert abs(float(space.basis[:, 0] @ expected.basis[:, 0])) == pytest.approx(1)


def test_directions_of_a_delta_are_its_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    base, u, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 5), (7, 2), (5, 2))
    )
    tuned = base + u @ v.T
    for dim, vectors in ((0, u), (1, v)):
        space = delta_subspace(base, tuned, 2, dim=dim)
        assert float(principal_angles(space, Subspace.spanned_by(vectors)).max()) < 1e-7
    with pytest.raises(ValueError, match="rank is 3; it must be from 1 to 2, which the vectors"):
        delta_subspace(base, tuned, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: Subspace(s.basis.float()), r"basis is torch\.float32 \[4, 2\]; it must be"),
        (lambda s: Subspace(s.basis * 2), "columns that are not orthonormal"),
        (lambda s: Subspace.spanned_by(torch.zeros(4, 2)), "rank is None; it must be from 1 to 0"),
        (lambda s: Subspace.spanned_by(torch.zeros(4)), r"vectors is \[4\]; it must be \[n, k\]"),
        (lambda s: Subspace.random(4, 5), "rank is 5; it must be from 1 to 4"),
        (lambda s: s.onto(torch.zeros(3)), "x has size 3 along -1; it must be 4"),
        (lambda s: overlap(s, Subspace.random(5, 2)), r"are of R\^4 and R\^5"),
        (lambda s: principal_angles(s, Subspace.random(5, 2)), r"are of R\^4 and R\^5"),
        (lambda s: overlap(s, s, utility=Subspace.random(4, 1)), "utility has rank 1; it must"),
        (lambda s: energy(torch.zeros(4, 2), s), "matrix is 0"),
        (lambda s: energy(torch.ones(3, 2), s), r"matrix is \[3, 2\]; it must be \[4, m\]"),
        (lambda s: output_subspace(torch.ones(3, 2), Gram(torch.eye(3), 1), 1), "weight is"),
        (lambda s: output_subspace(torch.ones(3, 3), Gram(torch.eye(3), 1), 4), "rank is 4"),
        (lambda s: delta_subspace(torch.ones(3, 2), torch.ones(2, 3), 1), "must be .* one shape"),
    ],
)
def test_wrong_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Subspace.random(4, 2))


def test_gram_matrices_come_in_passes_of_what_memory_holds() -> None:
    model = build("llama", dtype=torch.float64)
    batches, passed = [collate(rows((9, 7), seed=1))], []

    class Counted:
        def __iter__(self) -> Any:
            passed.append(1)
            return iter(batches)

    whole = gram(model, batches)
    names = [name for name in whole if "layers.0." in name]
    three = 3 * 8 * 48**2  # bytes: Q, K and V; O, gate and up; down, which is larger
    found = GramPasses(model, Counted(), names, at_once=three)
    for name in names:
        torch.testing.assert_close(found[name].matrix, whole[name].matrix)
    assert len(passed) == 3
    with pytest.raises(KeyError):
        found["model.layers.1.mlp.down_proj"]
