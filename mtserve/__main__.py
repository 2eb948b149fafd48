"""`python -m mtserve` is `mtserve`."""

from __future__ import annotations

import sys

from mtserve.cli import main

sys.exit(main())
