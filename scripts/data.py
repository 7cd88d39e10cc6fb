"""python scripts/data.py FILE [flags]: the same as `lite-dil data`; it shows what would be trained on, loading no model."""

import sys

from lite_dil.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
