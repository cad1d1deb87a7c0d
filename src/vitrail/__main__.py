"""`python -m vitrail` is the `vitrail` command."""

import sys

from vitrail.cli import main

sys.exit(main())
