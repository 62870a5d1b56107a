"""Checkpoints that are quantized already: each format's tensors onto our ops' parts.

formats.py says which there are, reader.py lets transformers load a model from them, placing.py
finds the model's parameters that the numbers went to.
"""
