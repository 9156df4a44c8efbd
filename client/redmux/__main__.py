"""`python -m redmux` is the `redmux` command."""

import sys

from redmux.cli import main

sys.exit(main())
