"""`python -m moe_ext`: the same as the console script `moe-ext`."""

import sys

from .cli.main import main

sys.exit(main())
