"""Makes this clone the package `smolpretrain`, for a command file that is run from it, whatever else is installed.

A command file begins with an `if` that runs this one; workers that multiprocessing spawns run it again, and so do as
their parent does. Installed, setup.cfg says the same (package_dir).
"""

import importlib.util
import sys
from pathlib import Path

_here = str(Path(__file__).resolve().parent)
if list(getattr(sys.modules.get("smolpretrain"), "__path__", [])) != [_here]:  # once: its rooms hang on the module
    _spec = importlib.util.spec_from_file_location(
        "smolpretrain", str(Path(_here, "__init__.py")), submodule_search_locations=[_here]
    )
    sys.modules["smolpretrain"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["smolpretrain"])
