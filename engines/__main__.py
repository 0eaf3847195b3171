"""`python -m engines`, and the entry point of the frozen executable."""

import sys

from engines.cli import main

if __name__ == "__main__":
    sys.exit(main())
