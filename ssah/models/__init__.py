"""Models as they are loaded and run: checkpoints, devices, packed weights, the hash of weights."""

from __future__ import annotations

from ssah.lazy import submodules_of
from ssah.models.checkpoint import Checkpoint, weights_folder
from ssah.models.checkpoint_writing import COPIED, copy_beside, write_checkpoint
from ssah.models.checks import ModelError, loading_errors, whole
from ssah.models.dtype import faster_dtype
from ssah.models.finite import naming_weights, nonfinite
from ssah.models.loading import (
    DTYPES,
    check_on_one_device,
    check_options,
    empty_model,
    load_model,
    load_tokenizer,
    load_weights,
    move,
    pick_device,
    put_tensor,
    quiet,
)
from ssah.models.offload import (
    at_hand,
    device_of,
    is_offloaded,
    replaced_forward,
    runs_own_forward,
    swapped,
)
from ssah.models.packed import (
    check_plain,
    dequantised,
    describe_packing,
    n_parameters,
    packed_modules,
    passing_gradients,
    scheme_of,
)
from ssah.models.running import as_it_was, check_backbone, check_idle, recomputing
from ssah.models.source import SMOLLM2, locate
from ssah.models.transfer import to_device, to_host
from ssah.models.weights import (
    cheap_weights_hash,
    check_same_weights,
    digest,
    digests,
    weights_hash,
)
from ssah.models.wrappers import check_bare, check_whole, config_size, text_config

__all__ = [
    "DTYPES",
    "SMOLLM2",
    "ModelError",
    "empty_model",
    "load_model",
    "load_tokenizer",
    "locate",
    "move",
    "pick_device",
    "put_tensor",
    "quiet",
]

__getattr__ = submodules_of(__name__)
