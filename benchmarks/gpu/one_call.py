"""One call of every operator on [2048, COLUMNS] of bfloat16, for compute-sanitizer to watch.

python -m benchmarks.gpu.one_call DEVICE BACKEND COLUMNS
"""

from __future__ import annotations

import sys

import torch

from ssah.studies.bench import CASES
from ssah_kernels import backends, timing

ROWS = 2048  # several chunks and segments of every kernel

if __name__ == "__main__":
    device, backend, columns = torch.device(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for case in CASES.values():
        with torch.no_grad(), backends.use(backend):
            case.ours(*case.make(ROWS, columns, torch.bfloat16, device))
    timing.wait(device)
