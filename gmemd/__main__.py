"""python -m gmemd: the same as the command gmemd."""

import sys

from gmemd.cli.gmemd import main

sys.exit(main())
