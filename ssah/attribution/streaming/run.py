"""``stream``: scores of a model that is larger than memory, layer by layer from its files.

Usually every layer is in memory, and batches pass one after another. Here every batch is in memory,
and layers pass one after another. Example: 3 batches, 2 layers, and a thread that reads ahead.

    thread    read 0 | read 1              |
    compute          | 0: batches 0, 1, 2  | 1: batches 0, 1, 2
    memory    0      | 0, 1                | 1

Hidden states wait between two layers: for each batch one tensor ``[rows, length, hidden]``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ssah.attribution.batches import Batch, BatchReader, counted_tokens
from ssah.attribution.result import METRICS, TOKENS, Attribution
from ssah.attribution.scores import all_column_sq_norms, score_all
from ssah.attribution.streaming.layers import LayeredModel, alone, on_device
from ssah.attribution.streaming.resuming import FileState, MemoryState
from ssah.attribution.sums import Sums, check_finite, check_ran, new_sums, on_host
from ssah.attribution.tally import BatchHash, Tally
from ssah.attribution.watch import watching
from ssah.choices import check_choice
from ssah.distributed import Ranks
from ssah.models import config_size, naming_weights
from ssah.moved import renamed
from ssah.progress import scoring_bar
from ssah.storage import one_run
from ssah.units import KINDS, DepthTwoModule, config_hash, find_modules
from ssah.version import __version__

STREAMED_METRICS = ("variance", "norm")


@dataclass(frozen=True)
class Traffic:
    """What a streamed run has moved.

    Attributes:
        bytes_needed: of weights that the backbone has in the files.
        bytes_read: of weights that this run has read; less only where it went on from a state.
        read_seconds: the reading thread has spent reading.
        wait_seconds: computing has waited for it.
    """

    bytes_needed: int
    bytes_read: int
    read_seconds: float
    wait_seconds: float


@renamed(state="resume_dir")
def stream(
    name: str,
    loader: Iterable[Mapping[str, Any]],
    *,
    metric: str = "variance",
    modules: Iterable[str] = KINDS,
    tokens: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    resume_dir: str | os.PathLike[str] | None = None,
    hidden_memory: int = 2**30,
    progress: bool = False,
) -> tuple[Attribution, Traffic]:
    """Score every unit of a model that need not fit in memory.

    The result is that of ``attribute(load_model(name)[0], loader)``, to the bit, in the memory of
    two layers. All batches pass through a layer before the next one takes its place; that one is
    read meanwhile, by a thread. Each weight is read once for the whole data set; the vocabulary
    projection, which these metrics do not need, is not read. Embeddings stay in memory, and hidden
    states: rows x length x ``hidden_size`` numbers over all batches.

    Args:
        name: a folder with safetensors, sharded or not, or a hub id; as of ``load_model``.
        loader: as of `attribute`; read once, before any weight.
        metric: ``"variance"`` or ``"norm"``.
        modules, tokens: as of `attribute`.
        dtype, device, trust_remote_code: as of ``load_model``.
        resume_dir: a folder that keeps what is done after each layer. The same call with the same
            folder goes on after the last layer that was done, and gives the same bits. It is not
            removed: do so when the result is saved.
        hidden_memory: bytes; hidden states that take more are kept in temporary files.
        progress: show a bar with layers.

    Returns:
        The scores, and what was read for them.

    Raises:
        ModelError: the model cannot be found, has no safetensors, or is quantised.
        ValueError, TypeError, FloatingPointError, RuntimeError: as of `attribute`; besides, a
            gradient metric, or a ``resume_dir`` that is damaged, of another run or in use by one.
    """
    check_choice("metric", metric, METRICS)
    check_choice("tokens", tokens, TOKENS)
    if metric not in STREAMED_METRICS:
        raise ValueError(
            f"metric is {metric!r}, which needs gradients: going backward would read every layer a "
            "second time and compute it anew. Streaming takes "
            f"{' and '.join(map(repr, STREAMED_METRICS))}; for others dispatch the model with a "
            "device_map, and use ssah.attribute"
        )
    layered = LayeredModel(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    modules = (modules,) if isinstance(modules, str) else tuple(modules)
    found = find_modules(layered.model, modules)
    batches, tokens, fingerprint, order = _read_loader(loader, layered, metric, tokens)
    identity = {
        "version": __version__,
        "torch": torch.__version__,
        "model": config_hash(layered.model),
        "weights": layered.checkpoint.fingerprint,
        "dtype": str(layered.dtype),
        "device": layered.device.type,
        "modules": sorted(modules),
        "tokens": tokens,
        "data": order,
    }
    in_files = _hidden_bytes(layered, batches) > hidden_memory
    with _state(resume_dir, identity, in_files=in_files) as done:
        n_layers = len(layered.layers)
        bar = scoring_bar("scoring layers", "{:,.2f} GB read", n_layers, done.layer)
        # What a Trainer has left on would compute in another dtype than the weights'.
        no_autocast = torch.autocast(layered.device.type, enabled=False)
        with bar if progress else nullcontext() as show, no_autocast:
            waited = _run(layered, found, batches, done, show)
    attribution = score_all(
        layered.model,
        found,
        done.sums,
        done.norms,
        metric=metric,
        tokens=tokens,
        fingerprint=fingerprint,
    )
    read = layered.checkpoint
    return attribution, Traffic(layered.bytes_needed, read.bytes_read, read.seconds, waited)


@contextmanager
def _state(
    resume_dir: str | os.PathLike[str] | None, identity: Mapping[str, Any], *, in_files: bool
) -> Iterator[MemoryState]:
    """Where hidden states and sums wait: in the user's folder, in temporary files or in memory."""
    with ExitStack() as stack:
        folder = resume_dir
        if folder is None and in_files:
            folder = stack.enter_context(TemporaryDirectory(prefix="ssah-"))
        if folder is None:
            yield MemoryState()
        else:
            stack.enter_context(one_run(folder))
            yield FileState(Path(folder), identity)


def _run(
    layered: LayeredModel,
    found: Mapping[str, DepthTwoModule],
    batches: Sequence[Batch],
    done: MemoryState,
    show: Callable[[float], None] | None,
) -> float:
    """Pass the batches through the layers that are left; seconds that computing has waited."""
    waited = 0.0
    left = range(done.layer, len(layered.layers))
    if not left:  # an earlier run has done all: nothing is to be read
        return waited
    layered.load_rest()
    with closing(_read_ahead(layered.read, left)) as ahead:
        for index in left:
            start = time.perf_counter()
            tensors = next(ahead)
            waited += time.perf_counter() - start
            layered.load(index, tensors)
            prefix = f"{layered.path}.{index}."
            own = {name: module for name, module in found.items() if name.startswith(prefix)}
            sums = new_sums(own)
            # Checked layer by layer: a NaN would reach all that follow, and be found hours later.
            with naming_weights(layered.model):
                _run_layer(layered, index, own, sums, batches, done)
                sums = on_host(sums)
                check_ran(own, sums)
                check_finite(sums, gradient=False)
            # Now, as the weights are about to go.
            norms = all_column_sq_norms(own)
            layered.unload(index)
            done.finish_layer(sums, norms)
            if show is not None:
                show(layered.checkpoint.bytes_read / 1e9)
    return waited


def _read_ahead(
    read: Callable[[int], dict[str, Tensor]], indices: Sequence[int]
) -> Generator[dict[str, Tensor]]:
    """What ``read`` gives for each index, while the next one is being read by a thread."""
    # One reading at a time, started when the one before is handed out: two layers in memory.
    with ThreadPoolExecutor(max_workers=1) as thread:
        reading = [thread.submit(read, index) for index in indices[:1]]
        for following in [*indices[1:], None]:
            tensors = reading.pop().result()
            if following is not None:
                reading.append(thread.submit(read, following))
            yield tensors


def _run_layer(
    layered: LayeredModel,
    index: int,
    modules: Mapping[str, DepthTwoModule],
    sums: Mapping[str, Sums],
    batches: Sequence[Batch],
    done: MemoryState,
) -> None:
    """Pass every batch through one layer.

    The backbone runs its own forward, so that the layer is given what it always is: masks,
    positions, whatever else the architecture makes. Its other layers only hand on hidden states.
    """
    last = index == len(layered.layers) - 1
    with (
        watching(modules, sums, gradient=False) as watch,
        alone(layered.layers, index) as handed,
        torch.inference_mode(),
    ):
        for number, batch in enumerate(batches):
            watch.read(batch)
            if index:  # the first layer takes what the model makes of its embeddings
                handed.input = on_device(done.get(number), layered.device)
            layered.model.base_model(**batch.inputs, use_cache=False)
            if not last:
                done.put(number, on_device(handed.output, torch.device("cpu")))


def _read_loader(
    loader: Iterable[Mapping[str, Any]], layered: LayeredModel, metric: str, tokens: str
) -> tuple[list[Batch], str, str, str]:
    """All batches, which tokens count, the fingerprint of the data, and the hash of the batches."""
    tally, order = Tally(getattr(loader, "fingerprint", None)), BatchHash()
    batches: list[Batch] = []
    reader = None
    for number, raw in enumerate(loader):
        if reader is None:  # the first batch says what "auto" means
            tokens = counted_tokens(raw) if tokens == "auto" else tokens
            # The device is named, as embeddings are on the meta device until weights are read.
            reader = BatchReader(layered.model, tokens=tokens, device=layered.device)
        batch = reader.read(raw, number)
        tally.add(batch)
        order.update(raw)
        batches.append(batch)
    tally.join(Ranks())
    tally.check(metric=metric, tokens=tokens)
    return batches, tokens, str(tally.fingerprint), order.hexdigest()


def _hidden_bytes(layered: LayeredModel, batches: Iterable[Batch]) -> int:
    """Of one tensor ``[rows, length, hidden]`` for each batch."""
    width = config_size(layered.model, "hidden_size")
    return sum(batch.input_ids.numel() for batch in batches) * width * layered.dtype.itemsize
