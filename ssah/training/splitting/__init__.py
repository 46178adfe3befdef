"""A model of which some units train: tensors split, projections that know which rows are whose."""

from __future__ import annotations

from ssah.training.splitting.masked_ffn import install_gated, uninstall_gated
from ssah.training.splitting.masked_rows import check_rows_split, split_rows
from ssah.training.splitting.masked_weights import check_weights_split, split_weights
from ssah.training.splitting.projection import MaskedProjection, pickling_error, replaced_slices
from ssah.training.splitting.split_model import split_model
from ssah.training.splitting.split_tensor import SplitTensor
from ssah.training.splitting.storage_order import complement_rows, runs, unit_major

__all__ = [
    "MaskedProjection",
    "SplitTensor",
    "check_rows_split",
    "check_weights_split",
    "complement_rows",
    "install_gated",
    "pickling_error",
    "replaced_slices",
    "runs",
    "split_model",
    "split_rows",
    "split_weights",
    "uninstall_gated",
    "unit_major",
]
