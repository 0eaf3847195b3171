"""Backends that engines are built for; a folder each."""
