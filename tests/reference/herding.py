"""Herding and class means as iCaRL (Rebuffi et al., CVPR 2017) defines them, sample by sample."""

import numpy as np


def herding(features, m):
    """Algorithm 4: choose, one by one, the sample that brings the mean of the chosen nearest."""
    features = np.asarray(features, dtype=np.float64)
    mean = features.mean(axis=0)
    chosen = []
    for k in range(1, min(m, len(features)) + 1):
        total = sum((features[i] for i in chosen), np.zeros(features.shape[1]))
        distances = {
            i: np.linalg.norm(mean - (total + features[i]) / k)
            for i in range(len(features))
            if i not in chosen
        }
        chosen.append(min(distances, key=distances.get))
    return chosen


def unit(features):
    """Return features ``[n, D]`` at length 1."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def class_mean(features):
    """Algorithm 1: the mean of normalised features ``[n, D]``, itself at length 1."""
    return unit(unit(features).mean(axis=0, keepdims=True))[0]
