"""Bundles inside diffusers pipelines, and step policies of other runtimes."""
