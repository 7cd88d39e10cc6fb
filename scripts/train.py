"""python scripts/train.py [flags]: the same as `lite-dil train`; without flags it trains the embedded model."""

import sys

from lite_dil.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
