"""Diffusers pipelines as they are found: loading, scheduler tables, families."""
