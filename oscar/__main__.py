"""`python -m oscar`: the command line."""

import sys

from oscar.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
