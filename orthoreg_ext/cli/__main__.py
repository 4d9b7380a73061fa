"""``python -m orthoreg_ext.cli``."""

import sys

from . import main

sys.exit(main())
