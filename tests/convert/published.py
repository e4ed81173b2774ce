"""State dicts in the published naming, name by name, with random values in float64."""

import torch


def values(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4 for name, shape in shapes.items()}
    return {name: x + 1 if "norm" in name.lower() and name.endswith("weight") else x for name, x in found.items()}


def vision(kind, *, scans=1, class_token=True, positions=False, depth=2, width=12, heads=2, patch=2, patches=6, classes=3):
    shapes = {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    if class_token:
        shapes["cls_token"] = (1, 1, width)
    if positions:
        shapes["pos_embed"] = (1, patches + class_token, width)
    for n in range(depth):
        shapes |= {
            f"blocks.{n}.norm1.weight": (width,),
            f"blocks.{n}.norm1.bias": (width,),
            f"blocks.{n}.attn.qkv.weight": (3 * width, width),
            f"blocks.{n}.attn.qkv.bias": (3 * width,),
            f"blocks.{n}.attn.proj.weight": (width, width),
            f"blocks.{n}.attn.proj.bias": (width,),
            f"blocks.{n}.norm2.weight": (width,),
            f"blocks.{n}.norm2.bias": (width,),
            f"blocks.{n}.mlp.fc1.weight": (2 * width, width),
            f"blocks.{n}.mlp.fc1.bias": (2 * width,),
            f"blocks.{n}.mlp.fc2.weight": (width, 2 * width),
            f"blocks.{n}.mlp.fc2.bias": (width,),
        }
        for gate in ("a_i", "a2_i")[:scans]:
            if kind == "D":
                shapes[f"blocks.{n}.attn.{gate}"] = (heads,)
            elif kind == "S":
                shapes |= {f"blocks.{n}.attn.{gate}.weight": (heads, width), f"blocks.{n}.attn.{gate}.bias": (heads,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,), "head.weight": (classes, width), "head.bias": (classes,)}
    return values(shapes)


def masked_lm(kind, *, positions=True, types=True, depth=2, width=12, heads=2, vocabulary=17, length=9):
    shapes = {"bert.embeddings.word_embeddings.weight": (vocabulary, width)}
    if positions:
        shapes["bert.embeddings.position_embeddings.weight"] = (length, width)
    if types:
        shapes["bert.embeddings.token_type_embeddings.weight"] = (2, width)
    shapes |= {"bert.embeddings.LayerNorm.weight": (width,), "bert.embeddings.LayerNorm.bias": (width,)}
    for n in range(depth):
        layer = f"bert.encoder.layer.{n}"
        for name in ("query", "key", "value"):
            shapes |= {f"{layer}.attention.self.{name}.weight": (width, width), f"{layer}.attention.self.{name}.bias": (width,)}
        if kind == "S":
            shapes |= {f"{layer}.attention.self.Wa_i.weight": (heads, width), f"{layer}.attention.self.Wa_i.bias": (heads,)}
        elif kind == "D":
            shapes[f"{layer}.attention.self.ai"] = (heads,)
        elif kind == "LIT":
            shapes |= {f"{layer}.attention.self.layer_norm.weight": (width,), f"{layer}.attention.self.layer_norm.bias": (width,)}
        shapes |= {
            f"{layer}.attention.output.dense.weight": (width, width),
            f"{layer}.attention.output.dense.bias": (width,),
            f"{layer}.attention.output.LayerNorm.weight": (width,),
            f"{layer}.attention.output.LayerNorm.bias": (width,),
            f"{layer}.intermediate.dense.weight": (3 * width, width),
            f"{layer}.intermediate.dense.bias": (3 * width,),
            f"{layer}.output.dense.weight": (width, 3 * width),
            f"{layer}.output.dense.bias": (width,),
            f"{layer}.output.LayerNorm.weight": (width,),
            f"{layer}.output.LayerNorm.bias": (width,),
        }
    shapes |= {
        "cls.predictions.transform.dense.weight": (width, width),
        "cls.predictions.transform.dense.bias": (width,),
        "cls.predictions.transform.LayerNorm.weight": (width,),
        "cls.predictions.transform.LayerNorm.bias": (width,),
        "cls.predictions.bias": (vocabulary,),
    }
    found = values(shapes)
    found["cls.predictions.decoder.weight"] = found["bert.embeddings.word_embeddings.weight"]
    found["cls.predictions.decoder.bias"] = found["cls.predictions.bias"]
    found["bert.embeddings.position_ids"] = torch.arange(length)[None]
    return found
