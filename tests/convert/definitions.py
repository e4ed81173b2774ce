"""What the published models compute, written out in float64: dense masks from loops, one head at a time (arXiv 2502.16249)."""

import math

import torch


def norm(x, weights, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def decay_mask(gates):
    """(L, L): products of the gates between two tokens, each key's side entering (the convention "key")."""
    length = len(gates)
    mask = torch.ones(length, length, dtype=gates.dtype)
    for i in range(length):
        for j in range(length):
            if i > j:
                mask[i, j] = gates[j:i].prod()
            elif i < j:
                mask[i, j] = gates[i + 1 : j + 1].prod()
    return mask


def in_order(gates, order):
    """The mask of tokens that are read in ``order``, its rows and columns in the tokens' own order."""
    mask = decay_mask(gates[order])
    back = torch.tensor(order).argsort()
    return mask[back][:, back]


def phi(x):
    shifted = x * torch.sigmoid(x) + 0.5
    return shifted / shifted.square().sum(-1, keepdim=True).sqrt()


def elu_plus_one(x):
    return torch.where(x > 0, x + 1, x.exp())


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)  # (L, width) -> (heads, L, features)


def vision_gates(weights, prefix, x, heads, class_token):
    """(heads, L) for each order, None where there is no decay."""
    found = []
    for name in ("a_i", "a2_i"):
        if f"{prefix}.{name}" in weights:
            found.append(torch.sigmoid(weights[f"{prefix}.{name}"]).reshape(heads, 1).expand(heads, len(x)))
        elif f"{prefix}.{name}.weight" in weights:
            gates = (1 - torch.sigmoid(linear(x, weights, f"{prefix}.{name}"))).T.clone()
            if class_token:
                gates[:, 0] = 1
            found.append(gates)
    return found


def vision(weights, images, *, heads, pool, softmax=False, orders=None):
    """Logits (B, classes); ``orders``: the two orders of the multi-scan, None for one scan as tokens come."""
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    kernel = weights["patch_embed.proj.weight"]
    size = kernel.shape[-1]
    class_token = "cls_token" in weights
    logits = []
    for image in images:
        x = torch.stack(
            [
                (kernel * image[:, r : r + size, c : c + size]).sum((1, 2, 3)) + weights["patch_embed.proj.bias"]
                for r in range(0, image.shape[1], size)
                for c in range(0, image.shape[2], size)
            ]
        )
        if class_token:
            x = torch.cat([weights["cls_token"].reshape(1, -1), x])
        if "pos_embed" in weights:
            x = x + weights["pos_embed"][0]
        for layer in range(depth):
            h = norm(x, weights, f"blocks.{layer}.norm1", 1e-6)
            x = x + linear(
                vision_attention(weights, f"blocks.{layer}.attn", h, heads, class_token, softmax, orders),
                weights,
                f"blocks.{layer}.attn.proj",
            )
            h = norm(x, weights, f"blocks.{layer}.norm2", 1e-6)
            x = x + linear(gelu(linear(h, weights, f"blocks.{layer}.mlp.fc1")), weights, f"blocks.{layer}.mlp.fc2")
        x = norm(x, weights, "norm", 1e-6)
        logits.append(linear(x[0] if pool == "cls" else x.mean(0), weights, "head"))
    return torch.stack(logits)


def vision_attention(weights, prefix, x, heads, class_token, softmax, orders):
    q, k, v = (heads_of(part, heads) for part in linear(x, weights, f"{prefix}.qkv").chunk(3, dim=-1))
    scale = q.shape[-1] ** -0.5
    if softmax:
        return torch.cat(list(torch.softmax(q @ k.transpose(1, 2) * scale, -1) @ v), dim=-1)
    gates = vision_gates(weights, prefix, x, heads, class_token)
    feature_map = phi if gates else elu_plus_one
    outputs = []
    for head in range(heads):
        scores = feature_map(q[head]) @ feature_map(k[head]).T * scale
        if orders is not None:
            masks = [in_order(g[head], order) for g, order in zip(gates, orders, strict=True)]
            numerator, denominator = sum(scores * m for m in masks) @ v[head] / 2, sum((scores * m).sum(1) for m in masks) / 2
        else:
            masked = scores * decay_mask(gates[0][head]) if gates else scores
            numerator, denominator = masked @ v[head], masked.sum(1)
        outputs.append(numerator / (denominator + 1e-6)[:, None])
    return torch.cat(outputs, dim=-1)


def masked_lm(weights, ids, mask, *, heads):
    """Logits (B, L, vocabulary); those at padded positions mean nothing."""
    depth = 1 + max(int(name.split(".")[3]) for name in weights if name.startswith("bert.encoder.layer."))
    word = weights["bert.embeddings.word_embeddings.weight"]
    logits = []
    for row, real in zip(ids, mask, strict=True):
        x = word[row]
        if "bert.embeddings.position_embeddings.weight" in weights:
            x = x + weights["bert.embeddings.position_embeddings.weight"][: len(row)]
        if "bert.embeddings.token_type_embeddings.weight" in weights:
            x = x + weights["bert.embeddings.token_type_embeddings.weight"][0]
        x = norm(x, weights, "bert.embeddings.LayerNorm", 1e-12)
        for layer in range(depth):
            prefix = f"bert.encoder.layer.{layer}"
            h = linear(text_attention(weights, f"{prefix}.attention.self", x, real, heads), weights, f"{prefix}.attention.output.dense")
            x = norm(x + h, weights, f"{prefix}.attention.output.LayerNorm", 1e-12)
            h = linear(gelu(linear(x, weights, f"{prefix}.intermediate.dense")), weights, f"{prefix}.output.dense")
            x = norm(x + h, weights, f"{prefix}.output.LayerNorm", 1e-12)
        x = norm(gelu(linear(x, weights, "cls.predictions.transform.dense")), weights, "cls.predictions.transform.LayerNorm", 1e-12)
        logits.append(x @ word.T + weights["cls.predictions.bias"])
    return torch.stack(logits)


def text_attention(weights, prefix, x, real, heads):
    q, k, v = (heads_of(linear(x, weights, f"{prefix}.{name}"), heads) for name in ("query", "key", "value"))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if f"{prefix}.Wa_i.weight" in weights:
        gates = (1 - torch.sigmoid(linear(x, weights, f"{prefix}.Wa_i"))).T
    elif f"{prefix}.ai" in weights:
        gates = torch.sigmoid(weights[f"{prefix}.ai"]).reshape(heads, 1).expand(heads, len(x))
    elif f"{prefix}.layer_norm.weight" in weights:
        gates = None
    else:
        return torch.cat(list(torch.softmax(scores.masked_fill(~real, -math.inf), -1) @ v), dim=-1)
    scores = scores.masked_fill(~real, 0)
    outputs = [scores[h] @ v[h] if gates is None else (scores[h] * decay_mask(gates[h])) @ v[h] for h in range(heads)]
    y = torch.cat(outputs, dim=-1)
    return norm(y, weights, f"{prefix}.layer_norm", 1e-12) if f"{prefix}.layer_norm.weight" in weights else y
