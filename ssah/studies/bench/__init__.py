"""``ssah bench``: every operator and ``attribute`` on this machine, beside PyTorch.

Every operator is timed in each backend that is there, beside the same formula in eager PyTorch and
under ``torch.compile``: calls are interleaved and inputs rotate, so that no cache answers. Rates
are bytes that the formula must move (read each input once, write each output once) per second.

    cases      one operator each: its inputs, and the same formula in PyTorch
    operators  times a case in every backend
    scoring    times ``attribute`` beside the model's own forward pass
    run        all of it, with progress; tables, a picture and a record
"""

from ssah.studies.bench.cases import CASES, Case
from ssah.studies.bench.run import run_bench

__all__ = ["CASES", "Case", "run_bench"]
