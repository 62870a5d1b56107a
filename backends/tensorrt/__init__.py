"""TensorRT and TensorRT-RTX: each segment step as an engine that holds its weights."""
