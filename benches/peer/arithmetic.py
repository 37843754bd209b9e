"""The error that cheaper ways to multiply would cost a convolution, computed with NumPy:
Winograd's F(2, 3) along one axis with its operands in 16 bits, and products of 8 bits. The table in
docs/kernels.md is its output.

    python benches/peer/arithmetic.py

A layer is a 3x3x3 convolution of 32 to 32 channels of a map as it is in the network: normed, leaky
ReLU. Sums are exact here (float64), so what differs is how operands are rounded. The error is the
distance to the same with no rounding at all, relative to its length; the output is not rounded. A
chain is a number of such layers with their norms, each of which gets the output of the one before,
rounded to the type of maps."""

import numpy as np

CHANNELS, EDGE, LAYERS = 32, 24, 8


def kept(bits, low, most):
    """Rounding to floats with so many bits of mantissa after the first, exponents from `low` on."""

    def rounded(x):
        exponent = np.maximum(np.frexp(x)[1] - 1, low)
        step = np.ldexp(1.0, exponent - bits)
        return np.clip(np.round(x / step) * step, -most, most)

    return rounded


f16, bf16 = kept(10, -14, 65504.0), kept(7, -126, 3.38e38)
e4m3, e5m2 = kept(3, -6, 448.0), kept(2, -14, 57344.0)


def scaled(narrow):
    """Rounding after a scale that brings the largest value to the type's largest: one for a map
    [d, h, w, c], one for each output of weights [3, 3, 3, c, o]."""
    largest = narrow(np.array(1e300))

    def rounded(x):
        most = np.abs(x).max() if x.ndim == 4 else np.abs(x).max((0, 1, 2, 3), keepdims=True)
        scale = largest / most
        return narrow(x * scale) / scale

    return rounded


def direct(x, w, left, right):
    """A convolution of x [d, h, w, c], which has its border, by w [3, 3, 3, c, o]."""
    x, w = left(x), right(w)
    d, h, k = (n - 2 for n in x.shape[:3])
    y = 0.0
    for tap in np.ndindex(3, 3, 3):
        part = x[tap[0] : tap[0] + d, tap[1] : tap[1] + h, tap[2] : tap[2] + k]
        y = y + part @ w[tap]
    return y


def winograd(x, w, left, right):
    """The same by F(2, 3) along the last axis: maps are rounded, transformed and rounded again,
    weights transformed and rounded."""
    x = left(x)
    g0, g1, g2 = w[:, :, 0], w[:, :, 1], w[:, :, 2]
    points = [right(g) for g in (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)]
    d, h, k = (n - 2 for n in x.shape[:3])
    v = [x[:, :, i : i + k : 2] for i in range(4)]
    inputs = [left(t) for t in (v[0] - v[2], v[1] + v[2], v[2] - v[1], v[1] - v[3])]
    m = []
    for t, g in zip(inputs, points):
        m.append(sum(t[i : i + d, j : j + h] @ g[i, j] for i, j in np.ndindex(3, 3)))
    y = np.empty((d, h, k, w.shape[-1]))
    y[:, :, 0::2], y[:, :, 1::2] = m[0] + m[1] + m[2], m[1] - m[2] - m[3]
    return y


def normed(x):
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    return np.where(x > 0, x, 0.01 * x)


def apart(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def whole(x):
    return x


def main():
    rng = np.random.default_rng(1)
    deviation = np.sqrt(2 / (27 * CHANNELS))
    weights = [rng.normal(0, deviation, (3, 3, 3, CHANNELS, CHANNELS)) for _ in range(LAYERS)]
    first = normed(rng.normal(0, 1, (EDGE, EDGE, EDGE, CHANNELS)))

    def bordered(x):
        return np.pad(x, ((1, 1), (1, 1), (1, 1), (0, 0)))

    def chain(convolve, maps):
        x = first
        for w in weights:
            x = normed(maps(convolve(bordered(maps(x)), w)))
        return x

    ways = [
        ("f16", direct, f16, f16, f16),
        ("f16, F(2, 3) along one axis", winograd, f16, f16, f16),
        ("bf16", direct, bf16, bf16, bf16),
        ("bf16, F(2, 3) along one axis", winograd, bf16, bf16, bf16),
        ("e4m3, a scale for each map, for each output", direct, scaled(e4m3), scaled(e4m3), f16),
        ("e4m3, weights in f16", direct, scaled(e4m3), f16, f16),
        ("e5m2, a scale for each map, for each output", direct, scaled(e5m2), scaled(e5m2), f16),
    ]
    exact = direct(bordered(first), weights[0], whole, whole)
    through = chain(lambda x, w: direct(x, w, whole, whole), whole)
    print(f"| products | a layer | {LAYERS} layers |\n|---|---|---|")
    for name, convolve, left, right, maps in ways:
        layer = apart(convolve(bordered(first), weights[0], left, right), exact)
        after = apart(chain(lambda x, w: convolve(x, w, left, right), maps), through)
        print(f"| {name} | {layer:.1e} | {after:.1e} |")


if __name__ == "__main__":
    main()
