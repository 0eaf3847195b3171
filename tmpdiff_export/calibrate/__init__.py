"""Calibration of a bundle on disk, in this process or by workers."""
