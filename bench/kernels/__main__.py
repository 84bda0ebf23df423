"""Entry point of `python -m bench.kernels`."""

import sys

from bench.kernels.run import main

if __name__ == "__main__":
    sys.exit(main())
