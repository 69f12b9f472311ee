"""``groundwire`` and ``python -m groundwire``."""

from __future__ import annotations

import sys

from groundwire.cli import main

if __name__ == "__main__":
    sys.exit(main())
