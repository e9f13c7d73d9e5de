"""`python -m sequencer2d`, and with it `torchrun -m sequencer2d`: the command line."""

import sys

from sequencer2d.cli import main

if __name__ == "__main__":
    sys.exit(main())
