"""The linear mixer in float64 as its documentation defines it, one sequence at a time: no operator, no gates, no scans of the package."""

import torch
from torch.nn import functional as F

EPS = 1e-6


def phi(x):
    shifted = F.silu(x) + 0.5
    return shifted / shifted.square().sum(-1, keepdim=True).sqrt()


MAPS = {
    "identity": lambda x: x,
    "elu_plus_one": lambda x: F.elu(x) + 1,
    "silu_normalised": phi,
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
}


def snake(height, width, columns):
    """Places of a grid in reading order, row by row (or column by column), every other one backwards."""
    lines = [[r * width + c for c in range(width)] for r in range(height)]
    if columns:
        lines = [[r * width + c for r in range(height)] for c in range(width)]
    return [place for n, line in enumerate(lines) for place in (line[::-1] if n % 2 else line)]


def orders_of(settings, length):
    scan, grid, first = settings["scan"], settings["grid"], int(settings["class_token"])
    if scan == "raster":
        return [list(range(length))]
    found = [snake(*grid, columns) for columns in ([False, True] if scan == "multi" else [False])]
    return [[0] * first + [place + first for place in order] for order in found]


def gates_of(gate, kind, x, heads):
    """lambda, (L, heads, Dk or 1)."""
    length = len(x)
    if kind == "none":
        return torch.ones(length, heads, 1, dtype=x.dtype)
    if kind.startswith("fixed"):
        logits = gate.logit.expand(length, *gate.logit.shape)
    else:
        logits = x @ gate.projection.weight.T + gate.projection.bias
    return torch.sigmoid(logits.reshape(length, heads, -1))


def used(i, j, convention):
    """The tokens whose gates lie between query i and key j."""
    if convention == "key":
        return range(j, i) if i > j else range(i + 1, j + 1)
    if convention == "query":
        return range(j + 1, i + 1) if i > j else range(i, j)
    return range(min(i, j) + 1, max(i, j) + 1)


def one_scan(q, k, v, gates, real, settings, direction):
    """Numerator (L, heads, Dv) and denominator (L, heads) of tokens in reading order."""
    length, heads, width = q.shape
    if settings["complement_keys"]:
        k = k * (1 - gates)
    if settings["open_first"]:
        gates = torch.cat([torch.ones_like(gates[:1]), gates[1:]])
    sees = torch.ones(length, length, dtype=torch.bool)
    sees = {"both": sees, "forward": sees.tril(), "backward": sees.triu()}[direction]
    scores = torch.zeros(length, length, heads, dtype=q.dtype)
    row_sum = torch.zeros(length, heads, dtype=q.dtype)
    for i in range(length):
        for j in range(length):
            if not (sees[i, j] and real[i] and real[j]):
                continue
            product = torch.ones_like(gates[0])
            for token in used(i, j, settings["convention"]):
                product = product * gates[token]
            weight = 2.0 if i == j and settings["diagonal"] == "twice" else 1.0
            scores[i, j] = weight * (q[i] * k[j] * product).sum(-1)
            row_sum[i] += (q[i] * k[j]).sum(-1)
    if settings["scale"] == "before":
        scores = scores / (row_sum[:, None] + EPS)
    if settings["scale"] == "none":
        scores = scores / width**0.5
    return torch.einsum("ijh,jhd->ihd", scores, v), scores.sum(1)


def normalise(y, layer, norm):
    """y: (L, heads, Dv)."""
    flat, eps = y.flatten(1), getattr(layer.norm, "eps", None)
    if norm == "none":
        return flat
    if norm == "rms":
        return flat / (flat.square().mean(-1, keepdim=True) + eps).sqrt() * layer.norm.weight
    over = y if norm == "group" else flat
    centred = over - over.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(flat.shape) * layer.norm.weight + layer.norm.bias


def definition(layer, x, real, settings):
    """The layer's output, (L, width), at real tokens; x: (L, width), real: (L,) bool, settings: all of the layer's arguments."""
    length, heads = len(x), settings["heads"]
    q, k, v = (part.reshape(length, heads, -1) for part in (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1))
    q, k = MAPS[settings["feature_map"]](q), MAPS[settings["feature_map"]](k)
    direction = settings["direction"]
    if direction == "alternating":
        direction = ("forward", "backward")[settings["layer"] % 2]
    orders = orders_of(settings, length)
    num, den = torch.zeros_like(v), torch.zeros(length, heads, dtype=x.dtype)
    for order, gate in zip(orders, (layer.gate, layer.gate2), strict=False):
        gates = gates_of(gate, settings["gate"], x, heads)
        one, other = one_scan(q[order], k[order], v[order], gates[order], real[order], settings, direction)
        for at, place in enumerate(order):
            num[place] += one[at] / len(orders)
            den[place] += other[at] / len(orders)
    y = num / (den + EPS)[..., None] if settings["scale"] == "after" else num
    return normalise(y, layer, settings["norm"]) @ layer.output.weight.T + layer.output.bias
