"""`python -m oscar`: the command line."""

import sys

from oscar.cli import main

if __name__ == "__main__":
    sys.exit(main())
