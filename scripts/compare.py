"""python scripts/compare.py [flags]: the same as `lite-dil compare`."""

import sys

from lite_dil.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
