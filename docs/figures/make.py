"""Draw all the pictures of these pages again: ``python docs/figures/make.py`` (needs matplotlib)."""

import runpy
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

if __name__ == "__main__":
    for script in sorted(FOLDER.glob("*.py")):
        if script.name not in ("make.py", "style.py"):
            print(script.name)
            runpy.run_path(str(script), run_name="__main__")
