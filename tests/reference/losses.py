"""Losses of the PODNet family as the papers (or, where named so, their code) define them, sample by
sample in float64."""

import math

import torch


def _pooled(squares, pooling):
    """Squares ``[C, H, W]`` of one sample to a list of numbers."""
    channels, height, width = squares.shape
    rows = [
        sum(squares[c, h, w] for w in range(width)) for c in range(channels) for h in range(height)
    ]
    columns = [
        sum(squares[c, h, w] for h in range(height)) for c in range(channels) for w in range(width)
    ]
    if pooling == "spatial":
        return rows + columns
    if pooling == "height":
        return rows
    if pooling == "width":
        return columns
    if pooling == "channels":
        return [
            sum(squares[c, h, w] for c in range(channels))
            for h in range(height)
            for w in range(width)
        ]
    return [squares[c].sum() / (height * width) for c in range(channels)]


def pod(old_maps, new_maps, pooling, normalize):
    """PODNet, section 3.1."""
    stages = []
    for old_stage, new_stage in zip(old_maps, new_maps, strict=True):
        samples = []
        for old, new in zip(old_stage, new_stage, strict=True):
            vectors = []
            for maps in (old, new):
                vector = torch.stack(_pooled(maps**2, pooling))
                vectors.append(vector / (vector**2).sum().sqrt() if normalize else vector)
            samples.append(((vectors[0] - vectors[1]) ** 2).sum().sqrt())
        stages.append(sum(samples) / len(samples))
    return sum(stages) / len(stages)


def nca(similarities, targets, scale, margin, hinge):
    """PODNet, section 3.2."""
    losses = []
    for row, t in zip(similarities, targets, strict=True):
        numerator = torch.exp(scale * (row[t] - margin))
        denominator = sum(torch.exp(scale * y) for i, y in enumerate(row) if i != t)
        loss = -torch.log(numerator / denominator)
        losses.append(torch.clamp(loss, min=0) if hinge else loss)
    return sum(losses) / len(losses)


def nca_released(similarities, targets, scale, margin):
    """The released code, statement by statement, margin included."""
    losses = []
    for row, t in zip(similarities, targets, strict=True):
        moved = [scale * (y - margin) for y in row]
        top = max(moved)
        moved = [y - top for y in moved]
        total = sum(torch.exp(y - y) if i == t else torch.exp(y) for i, y in enumerate(moved))
        losses.append(-(moved[t] - torch.log(total)))
    return sum(losses) / len(losses)


def distillation(new_logits, old_logits, temperature):
    """``T^2 sum_c p_old(c) log(p_old(c) / p_new(c))``, the mean over the batch."""
    total = 0
    for new, old in zip(new_logits, old_logits, strict=True):
        p_new, p_old = torch.exp(new / temperature), torch.exp(old / temperature)
        p_new, p_old = p_new / p_new.sum(), p_old / p_old.sum()
        total = total + sum(
            q * (torch.log(q) - torch.log(p)) for p, q in zip(p_new, p_old, strict=True)
        )
    return temperature**2 * total / len(new_logits)


def soft_cross_entropy(new_logits, old_logits, temperature):
    """``-sum_c p_old(c) log(p_new(c))``, the mean over the batch: BiC and WA, and PyCIL's iCaRL."""
    total = 0
    for new, old in zip(new_logits, old_logits, strict=True):
        p_new, p_old = torch.exp(new / temperature), torch.exp(old / temperature)
        p_new, p_old = p_new / p_new.sum(), p_old / p_old.sum()
        total = total - sum(q * torch.log(p) for p, q in zip(p_new, p_old, strict=True))
    return total / len(new_logits)


def cross_entropy(logits, targets):
    """``-log(p(target))``, the mean over the batch."""
    losses = [
        -torch.log(torch.exp(row[t]) / torch.exp(row).sum())
        for row, t in zip(logits, targets, strict=True)
    ]
    return sum(losses) / len(losses)


def less_forget(old_features, new_features):
    """UCIR, equation 6."""
    cosines = [
        (a @ b) / math.sqrt(a @ a) / (b @ b).sqrt()
        for a, b in zip(old_features, new_features, strict=True)
    ]
    return sum(1 - cosine for cosine in cosines) / len(cosines)


def margin_ranking(similarities, targets, old_classes, k, margin):
    """UCIR, equation 8, averaged as in the authors' code."""
    terms = []
    for row, t in zip(similarities, targets, strict=True):
        if int(t) not in old_classes:
            continue
        new = [y for c, y in enumerate(row) if c not in old_classes]
        for hard in sorted(new, key=lambda y: y.item(), reverse=True)[:k]:
            terms.append(torch.clamp(margin - row[t] + hard, min=0))
    return sum(terms) / len(terms) if terms else similarities.sum() * 0


def proxy_similarities(features, proxies, gamma):
    """PODNet, section 3.2, local similarities: ``[B, D]`` and ``[C, K, D]`` to ``[B, C]``."""
    rows = []
    for feature in features:
        row = []
        for of_class in proxies:
            cosines = torch.stack(
                [(feature @ p) / ((feature @ feature).sqrt() * (p @ p).sqrt()) for p in of_class]
            )
            shares = torch.exp(gamma * cosines)
            row.append((shares / shares.sum() * cosines).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)
