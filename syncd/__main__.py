"""Where the command ``syncd`` and ``python -m syncd`` begin: what concerns the process as a whole."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line and exit."""
    gc.disable()  # what imports make stays: looking it over and over costs a twelfth of a command's start
    from syncd.allocator import keep_buffers  # noqa: PLC0415
    from syncd.cli import run  # noqa: PLC0415

    gc.freeze()  # and some 5 % of a push
    gc.enable()
    gc.set_threshold(100_000, 50, 50)
    keep_buffers()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
