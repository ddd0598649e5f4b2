"""``python -m pyproxy`` is the ``pyproxy`` command."""

import sys

from pyproxy.cli import main

sys.exit(main())
