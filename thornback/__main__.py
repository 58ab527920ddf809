"""`python -m thornback`, and the console script `thornback`."""

import sys

from thornback.cli import main

if __name__ == "__main__":
    sys.exit(main())
