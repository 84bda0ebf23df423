"""Entry point of `python -m bench`."""

import sys

from bench.eval.cli import main as eval_main
from bench.load.cli import main

if __name__ == "__main__":
    sys.exit(eval_main(sys.argv[2:]) if sys.argv[1:2] == ["eval"] else main())
