"""Lambda by length: a variant of our own, in which lambda is per token and so the same for short and long texts."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = TypeVar("Array", Tensor, NDArray[np.float64])


def by_length(logps: Array, tokens: Array, mean_tokens: float) -> Array:
    """Log-probabilities, each times the targets' mean length over the length of its own text."""
    return logps * (mean_tokens / tokens)
