"""Weights of models, one tensor at a time: read from a pipeline's folder, kept in files, used layer by layer."""
