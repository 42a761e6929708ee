"""`python -m hookctl`, the same as the command `hookctl`."""

import sys
from pathlib import Path

# Python looks for modules where the command stands: a downloaded folder with a torch.py in it would
# be run. Only a checkout is its own folder of modules.
if Path.cwd() != Path(__file__).resolve().parents[1]:
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != Path.cwd()]

from hookctl.cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
