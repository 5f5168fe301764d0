"""`python -m usmlite` is the command `usmlite`."""

import sys

from usmlite.cli import main

if __name__ == "__main__":
    sys.exit(main())
