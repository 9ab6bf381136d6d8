"""`python -m vidgen` is the same door as the `vidgen` command."""

import sys

from vidgen.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
