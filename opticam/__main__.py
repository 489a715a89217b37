"""`python -m opticam` is the command line."""

import sys

from opticam.cli import main

if __name__ == "__main__":
    sys.exit(main())
