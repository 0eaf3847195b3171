"""Backends: a folder each, the table of all, and the device loop that several share."""
