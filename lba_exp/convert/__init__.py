"""Weights from elsewhere, and to elsewhere: published names, safetensors, model folders.

model = load_lion_mlm(read_weights("model.safetensors"), num_heads=12)
model.save_pretrained("folder")
model = from_pretrained("folder")
"""

from lba_exp.convert.files import read_model, read_weights, write_published
from lba_exp.convert.mlm import load_lion_mlm
from lba_exp.convert.published import to_published
from lba_exp.convert.vision import load_lion_vision
from lba_exp.models.pretrained import create, from_pretrained, save_pretrained

__all__ = [
    "create",
    "from_pretrained",
    "load_lion_mlm",
    "load_lion_vision",
    "read_model",
    "read_weights",
    "save_pretrained",
    "to_published",
    "write_published",
]
