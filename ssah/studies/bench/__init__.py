"""``ssah bench``: every operator and ``attribute`` on this machine, beside PyTorch."""
