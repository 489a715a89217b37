"""`python -m opticam` is the command line."""

import sys

from opticam.cli import main

sys.exit(main())
