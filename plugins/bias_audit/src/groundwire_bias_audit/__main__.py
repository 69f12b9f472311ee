"""``python -m groundwire_bias_audit``."""

import sys

from groundwire_bias_audit.cli import main

if __name__ == "__main__":
    sys.exit(main())
