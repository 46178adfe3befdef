"""Optimisers over the masked update operators: what is not trained costs and changes nothing.

Take a weight [1000, 64] of which 200 rows train. The gradient's trained rows, both moments and
the update are [200, 64]; the other 800 rows are neither read nor written.

    base        the step: which tensors share a call, clipping, importance
    calls       the tensors of one call of an operator
    checkpoint  saving and resuming
    options     what an option must be, and what of a parameter trains
    adamw, sgd  the two optimisers
"""

from .adamw import MaskedAdamW
from .sgd import MaskedSGD

__all__ = ["MaskedAdamW", "MaskedSGD"]
