"""`python -m moe_ext`: the same as the console script `moe-ext`."""

import sys

from .cli import main

sys.exit(main())
