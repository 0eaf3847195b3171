"""Child processes whose signals do what they do by default, however the tests were started."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any


def start(words: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
    """A child with SIGINT, SIGTERM and SIGHUP at their defaults: `nohup` and background jobs ignore some, and that is
    inherited.

    Args:
        words: the command; it keeps the process id.
        **popen: as for `subprocess.Popen`.
    """
    return subprocess.Popen(["env", "--default-signal=INT,TERM,HUP", *words], **popen)
