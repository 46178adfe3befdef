"""The low-rank part against numpy's SVD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuned import FAMILIES, assert_same_state, loaded, pair, saved

from ssah import deltas
from ssah.deltas import low_ranks


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_has_its_best_approximation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_ranks, "BLOCK", 500)  # several blocks of rows a matrix
    base, tuned = pair(name)
    found: Any = deltas.low_rank(base, tuned, 5)
    for key, after in tuned.state_dict().items():
        if after.dim() < 2:
            assert found[key].equal(after), key
            continue
        before = base.state_dict()[key].double().numpy()
        u, s, vt = np.linalg.svd(after.double().numpy() - before, full_matrices=False)
        part = (u[..., :, :5] * s[..., None, :5]) @ vt[..., :5, :]
        expected = torch.from_numpy(before + part).float()
        torch.testing.assert_close(found[key], expected, rtol=3e-7, atol=1e-8)


def test_a_change_of_low_rank_is_kept_whole_and_full_rank_has_the_bits(tmp_path: Path) -> None:
    base, tuned = pair("llama", torch.float64)
    name = "model.layers.1.self_attn.q_proj.weight"
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(48, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        tuned.get_parameter(name).copy_(base.get_parameter(name) + u @ v.T)
    found: Any = deltas.low_rank(base, tuned, 3)
    torch.testing.assert_close(found[name], tuned.state_dict()[name], rtol=0, atol=1e-9)
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    deltas.low_rank(*folders, 48, out=tmp_path / "out")
    assert_same_state(loaded(tmp_path / "out"), dict(tuned.state_dict()))


def test_a_rank_that_is_none_is_refused() -> None:
    base, tuned = pair("llama")
    with pytest.raises(ValueError, match="rank is 0; it must be 1 or more"):
        deltas.low_rank(base, tuned, 0)
