"""The commands: one thin file each over a library room. A file here holds the help and the arguments; the room is imported inside
the command's body, so that `--help` answers at once.
"""

import os
import signal
import sys
from types import FrameType


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C while the command is still being imported: nothing has begun."""
    os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode())
    os._exit(130)


# only for the commands themselves; cli/common.py gives Ctrl-C back its usual meaning
if os.path.basename(sys.argv[0]).startswith("cropi-") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)
