"""Prints the nvcc to build with and the compute capabilities of the visible GPUs.

One line each; a line is empty where there is none.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def find_nvcc() -> str:
    """$CUDACXX, then PATH, then the nvidia-cuda-nvcc wheel on sys.path; "" where there is none."""
    if named := os.environ.get("CUDACXX"):
        if not (found := shutil.which(named)):
            sys.exit(f"CUDACXX={named} is not an executable file: correct it or unset it")
        return found
    if found := shutil.which("nvcc"):
        return found
    in_wheels = (nvcc for entry in sys.path for nvcc in sorted(Path(entry).glob("nvidia/cu*/bin/nvcc"), reverse=True))
    return str(next(in_wheels, ""))


def visible_capabilities() -> list[str]:
    """Compute capabilities such as "90", each once."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({line.strip().replace(".", "") for line in output.splitlines() if line.strip()})


if __name__ == "__main__":
    print(find_nvcc())
    print(";".join(visible_capabilities()))
