"""Prints the nvcc to build with, or nothing: $CUDACXX, then PATH, then the nvidia-cuda-nvcc wheel on sys.path."""

import os
import shutil
import sys
from pathlib import Path


def find_nvcc() -> str | None:
    """The first nvcc found, as an absolute path."""
    if named := os.environ.get("CUDACXX"):
        if not (found := shutil.which(named)):
            sys.exit(f"CUDACXX={named} is not an executable file: correct it or unset it")
        return found
    if found := shutil.which("nvcc"):
        return found
    for entry in sys.path:
        for nvcc in sorted(Path(entry).glob("nvidia/cu*/bin/nvcc"), reverse=True):
            return str(nvcc)
    return None


if __name__ == "__main__":
    print(find_nvcc() or "")
