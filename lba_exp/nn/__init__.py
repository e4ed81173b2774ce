"""Layers: feature maps, gates, linear and softmax attention, blocks. They call ``lba_exp.ops`` and know no configuration."""
