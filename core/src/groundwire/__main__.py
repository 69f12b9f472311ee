"""``groundwire`` and ``python -m groundwire``."""

from __future__ import annotations

import sys

from groundwire.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
