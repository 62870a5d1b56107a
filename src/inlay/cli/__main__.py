"""`python -m inlay.cli` is the `inlay` command."""

import sys

from inlay.cli import main

sys.exit(main())
