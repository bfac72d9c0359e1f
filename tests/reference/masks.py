"""HAT's gradient and DER's sparsity loss, number by number as the papers print them, in float64."""

import math


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def hat_gradient(gradient, e, s, s_max):
    """What an embedding's gradient is after HAT's compensation, equations 4 to 6.

    First through the gate, then compensated as HAT does it: in terms of cosh, ``|s e|`` clamped.
    """
    through_the_gate = gradient * s / (2 * (math.cosh(s * e) + 1))
    clamped = max(-50, min(50, s * e))
    return through_the_gate * s_max / s * (math.cosh(clamped) + 1) / (math.cosh(e) + 1)


def sparsity(used, widths, areas, image_channels=3):
    """DER's L_S of a chain of layers: |m_l|_1, c_l and K_l for l = 1, 2, ..."""
    used, widths = [image_channels, *used], [image_channels, *widths]
    numerator = denominator = 0
    for layer in range(1, len(used)):
        numerator += areas[layer - 1] * used[layer - 1] * used[layer]
        denominator += areas[layer - 1] * widths[layer - 1] * widths[layer]
    return numerator / denominator
