"""Layers that read quantized checkpoints without the packages that wrote them.

`layers.py` says which there are, `base.py` what they share, `loading.py` how transformers' `from_pretrained` comes to build them.
"""
