"""`tmpdiff-export` as it is, but with a line of progress every half second: `python -m tools.scale.command WORDS`."""

from __future__ import annotations

import sys

from tmpdiff_export import cli, display

if __name__ == "__main__":
    display.LINE_SECONDS = 0.5
    sys.exit(cli.main())
