"""A linear probe: the direction of features that tells two classes apart, by logistic regression.

With features z of rows, standardised channel by channel, and y = 1 or -1 for the two classes,

    minimise over w, b      sum_rows log(1 + exp(-y (w . z + b))) + penalty / 2 |w|^2

Example: one channel is 1 in the rows of the first class and -1 in the others. Its weight is above
0, and that of a channel that is the same in all rows is 0. With penalty 1 it is scikit-learn's
LogisticRegression with C = 1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

_EXACT = 1e-5  # how far weights may be from the best ones, of standardised features


def logistic_regression(first: Tensor, second: Tensor, *, penalty: float = 1.0) -> Tensor:
    """The weights by which features tell the rows of ``first`` from those of ``second``.

    Args:
        first, second: features of the rows of each class, ``[rows, channels]``.
        penalty: of the squared length of the weights, above 0: without it, classes that a plane
            divides have no best weights.

    Returns:
        float64 ``[channels]``, of standardised features: above 0 where they speak for ``first``.

    Raises:
        ValueError: a class has no row, the channels differ, or ``penalty`` is not above 0.
        RuntimeError: the minimum was not reached.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"first is {list(first.shape)} and second {list(second.shape)}; they must be [rows, "
            "channels] with the same channels"
        )
    if not len(first) or not len(second):
        raise ValueError("first or second has no row; each class must have at least one")
    if not penalty > 0:
        raise ValueError(f"penalty is {penalty}; it must be above 0")
    x = torch.cat([first, second]).double()
    # A channel that never changes tells nothing: 0, and not 0 / 0.
    deviation = x.std(0, unbiased=False)
    z = torch.where(deviation > 0, (x - x.mean(0)) / deviation.clamp(min=1e-300), 0.0).numpy()
    y = np.ones(len(x))
    y[len(first) :] = -1

    def loss(w_and_b: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w, margins = w_and_b[:-1], y * (z @ w_and_b[:-1] + w_and_b[-1])
        pull = -y * expit(-margins)  # d loss / d (w . z + b), [rows]
        value = np.logaddexp(0, -margins).sum() + penalty / 2 * float(w @ w)
        return float(value), np.append(z.T @ pull + penalty * w, pull.sum())

    def curvature(w_and_b: NDArray[np.float64], along: NDArray[np.float64]) -> NDArray[np.float64]:
        """The Hessian times a direction, without the Hessian, ``[channels + 1]``."""
        p = expit(z @ w_and_b[:-1] + w_and_b[-1])
        bent = p * (1 - p) * (z @ along[:-1] + along[-1])  # [rows]
        return np.append(z.T @ bent + penalty * along[:-1], bent.sum())

    # Second order: a line search by the loss alone ends where its rounding does.
    start, options = np.zeros(z.shape[1] + 1), {"gtol": 1e-6 * penalty}
    found = minimize(loss, start, jac=True, hessp=curvature, method="trust-ncg", options=options)
    # The penalty makes weights as exact as the gradient divided by it is small.
    left = float(np.linalg.norm(found.jac)) / penalty
    if not left <= _EXACT:
        raise RuntimeError(
            f"the probe's weights may be {left:.1e} from their best, must be within {_EXACT:g}: "
            f"{found.message}; raise the penalty, which is {penalty}"
        )
    return torch.from_numpy(found.x[:-1].copy())
