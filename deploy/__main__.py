"""``python -m deploy`` is the `gdpo` command."""

import sys

from deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
