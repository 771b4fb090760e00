"""Evaluation figures of predicted click probabilities."""

from __future__ import annotations

import math

import numpy as np


def click_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """AUC, log loss (nats), normalised entropy and accuracy at probability 1/2.

    Normalised entropy is the log loss over that of always saying the share of clicks (He et al.,
    *Practical lessons from predicting clicks on ads at Facebook*, ADKDD 2014, section 3).

    `logits` (n,) and `labels` (n,) of 0 and 1. Log loss is computed from the logits in float64, so
    no probability is clipped. AUC is scikit-learn's; NaN when only one class is present, all NaN
    for n = 0.
    """
    if len(logits) == 0:
        return dict.fromkeys(("auc", "log_loss", "normalized_entropy", "accuracy"), math.nan)
    from sklearn.metrics import (
        roc_auc_score,
    )  # a second to import: only when something is evaluated

    logits = logits.astype(np.float64)
    positive = labels > 0
    one_class = positive.all() or not positive.any()
    log_loss = float(np.mean(np.logaddexp(0.0, np.where(positive, -logits, logits))))
    rate = float(positive.mean())
    entropy = math.nan if one_class else -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    return {
        "auc": math.nan if one_class else float(roc_auc_score(positive, logits)),
        "log_loss": log_loss,
        "normalized_entropy": log_loss / entropy,
        "accuracy": float(np.mean((logits > 0) == positive)),
    }
