"""`python -m converters.cli`: the same as `convert-deepseek`."""

import sys

from converters.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
