"""python -m neox_lite_app: the same as the console script."""

import sys

from .cli import main

sys.exit(main())
