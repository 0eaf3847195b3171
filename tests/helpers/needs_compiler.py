"""The mark of tests that compile torch packages."""

from __future__ import annotations

import shutil

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling packages needs g++")
