import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts and common/
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
