"""`python -m gankern` is the command `gankern`."""

import sys

from gankern.cli.main import main

sys.exit(main())
