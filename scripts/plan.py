"""python scripts/plan.py [flags]: the same as `lite-dil plan`; says whether a run fits, before anything is downloaded."""

import sys

from lite_dil.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
