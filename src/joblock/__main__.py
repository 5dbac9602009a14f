"""`python -m joblock` is the command `joblock`."""

import sys

from ._cli import main

if __name__ == "__main__":
    sys.exit(main())
