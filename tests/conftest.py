import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts and common/
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


@pytest.fixture
def double():
    """In float64, what is equal is equal to 1e-9 on every machine."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def pool():
    """Up to four processes, for all tests."""
    from pool import Pool
    pool = Pool()
    yield pool
    pool.close()
