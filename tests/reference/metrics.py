"""Plain numpy re-statements of the metrics, sample by sample, from raw logits and features."""

import numpy as np


def cnn_ranking(logits, seen):
    """Return the seen classes of one sample ``[width]``, best logit first, lowest id of equals."""
    return sorted((c for c in seen if c < len(logits)), key=lambda c: (-logits[c], c))


def nme_ranking(features, classes, means):
    """Return the classes of one sample ``[D]``, nearest mean (squared distance) first."""
    features = np.asarray(features, dtype=np.float64)
    features = features / np.linalg.norm(features)
    distances = [((features - np.asarray(mean, dtype=np.float64)) ** 2).sum() for mean in means]
    return [classes[i] for i in np.argsort(distances, kind="stable")]


def accuracy(rankings, targets, seen, top=1):
    """Return the fraction of samples of seen classes with their class among the first ``top``."""
    right = [t in ranking[:top] for ranking, t in zip(rankings, targets, strict=True) if t in seen]
    return float(np.mean(right)) if right else float("nan")


def confusion_matrix(rankings, targets, seen):
    """Return how many samples of a seen class (row) have a seen class (column) ranked first."""
    return [
        [
            sum(t == row and ranking[0] == c for ranking, t in zip(rankings, targets, strict=True))
            for c in seen
        ]
        for row in seen
    ]


def forgetting(history):
    """Return the mean fall of a class below its best, from accuracies per class over time."""
    present = history[-1]
    falls = []
    for c in present:
        earlier = [past[c] for past in history[:-1] if c in past]
        falls.append(max(max(earlier) - present[c], 0) if earlier else 0)
    return float(np.mean(falls))
