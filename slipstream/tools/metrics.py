"""Evaluation figures of predicted click probabilities."""

from __future__ import annotations

import math

import numpy as np


def click_metrics(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float]:
    """AUC, log loss (nats), normalised entropy and accuracy at probability 1/2.

    Normalised entropy is the log loss over that of always saying the share of clicks (He et al.,
    *Practical lessons from predicting clicks on ads at Facebook*, ADKDD 2014, section 3).

    `logits` (n,) and `labels` (n,) of 0 and 1; with `weights` (n,) all are weighted, as by
    scikit-learn's `sample_weight`, and inputs of weight 0 are not there. Log loss is computed from
    the logits in float64, so no probability is clipped. AUC is scikit-learn's; NaN when only one
    class is present, all NaN for n = 0.
    """
    if weights is not None:
        counts = weights > 0
        logits, labels, weights = logits[counts], labels[counts], weights[counts].astype(np.float64)
    if len(logits) == 0:
        return dict.fromkeys(("auc", "log_loss", "normalized_entropy", "accuracy"), math.nan)
    # A second to import: only when something is evaluated.
    from sklearn.metrics import roc_auc_score

    logits = logits.astype(np.float64)
    positive = labels > 0
    log_loss = float(_mean(np.logaddexp(0.0, np.where(positive, -logits, logits)), weights))
    rate = float(_mean(positive, weights))
    one_class = not 0 < rate < 1
    entropy = math.nan if one_class else -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    return {
        "auc": math.nan
        if one_class
        else float(roc_auc_score(positive, logits, sample_weight=weights)),
        "log_loss": log_loss,
        "normalized_entropy": log_loss / entropy,
        "accuracy": float(_mean((logits > 0) == positive, weights)),
    }


def probabilities(logits: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """Of logits, in float64; `shift` is added to them first."""
    logits = logits.astype(np.float64) + shift
    # exp of what is not positive: nothing overflows.
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def mean_calibration(
    predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float]:
    """Weighted share of clicks, mean probability, and the second over the first (`calibration`).

    All NaN for no inputs, or none with a weight.
    """
    if not len(labels) or (weights is not None and not weights.sum() > 0):
        return dict.fromkeys(("click_rate", "mean_probability", "calibration"), math.nan)
    rate, mean = (float(np.average(values, weights=weights)) for values in (labels > 0, predicted))
    over = mean / rate if rate > 0 else math.nan
    return {"click_rate": rate, "mean_probability": mean, "calibration": over}


def calibration(
    probabilities: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    num_bins: int = 10,
) -> list[tuple[int, float, float]]:
    """A reliability table: of `num_bins` groups of as many inputs, by probability, (inputs, mean
    probability, share of clicks), both weighted.

    Equal probabilities are in the order of the inputs. Groups without weight are left out.
    """
    order = np.argsort(probabilities, kind="stable")
    table = []
    for part in np.array_split(order, min(num_bins, max(len(order), 1))):
        of_part = None if weights is None else weights[part].astype(np.float64)
        if len(part) and (of_part is None or of_part.sum() > 0):
            mean = float(np.average(probabilities[part], weights=of_part))
            rate = float(np.average(labels[part] > 0, weights=of_part))
            table.append((len(part), mean, rate))
    return table


def _mean(values: np.ndarray, weights: np.ndarray | None) -> np.floating:
    # Not `np.average`, which adds up in another order where nothing is weighted.
    return np.mean(values) if weights is None else np.average(values, weights=weights)
