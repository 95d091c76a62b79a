"""Player weights (MPW): where beta is computed.

m_j = lambda * [log pi_theta(y) - log pi_theta(g)] - lambda * d_j with d_j = log pi_j(y|x) - log pi_j(g|x). The
bracket is the same for every player and softmax ignores a common shift, so

    beta_j = exp(-gamma m_j) / sum_k exp(-gamma m_k) = softmax_j(gamma * lambda * d_j)

does not depend on theta: it is computed once, before training, from the players' log-probabilities alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def player_weights(
    chosen: NDArray[np.floating], rejected: NDArray[np.floating], *, gamma: float, scale: float
) -> NDArray[np.float64]:
    """beta [T, K] from the players' log-probabilities of targets and responses, [T, K] each, in nats.

    gamma = 0 weighs all players alike. Raises ValueError where a log-probability is not finite.
    """
    log_ratio = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    if not np.isfinite(log_ratio).all():
        raise ValueError(f"log-probability is not finite in rows {np.flatnonzero(~np.isfinite(log_ratio).all(-1))[:5]}")
    logits = gamma * scale * log_ratio
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
