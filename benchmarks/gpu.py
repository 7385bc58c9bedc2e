"""The command for a machine with a GPU, from a checkout that is not installed; its code is benchmarks/gpu/measure.py."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])
# Read when torch and the kernels are imported.
if "--rehearse" in sys.argv:
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
if "--packages" in sys.argv[:-1]:
    sys.path.append(sys.argv[sys.argv.index("--packages") + 1])

if __name__ == "__main__":
    from benchmarks.gpu.measure import main

    sys.exit(main())
