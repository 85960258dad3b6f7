"""Python in which packages that nothing needs to start are not installed: put this folder on PYTHONPATH.

Neither importing nor looking for them finds them, nor those that ALSO_ABSENT names, in this process and in those that
it starts.
"""

import os
import sys
from importlib.machinery import PathFinder

ABSENT = {
    "bitsandbytes",
    "datasets",
    "dill",
    "hypothesis",
    "liger_kernel",
    "math_verify",
    "matplotlib",
    "multiprocess",
    "pandas",
    "pyarrow",
    "rich",
    "trl",
    *os.environ.get("ALSO_ABSENT", "").split(),
}


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in ABSENT else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        found = super().find_distributions(*args, **kwargs)
        return (one for one in found if one.metadata["Name"].lower().replace("-", "_") not in ABSENT)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
