"""Proof at real size: `python -m tools.scale` makes a pipeline folder and takes it through the product's commands."""
