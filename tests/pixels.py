"""kNN of the demo data on raw pixels and on 8 x 8 thumbnails, what a network has to beat: python tests/pixels.py"""

import sys
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mocov2_asym as script  # noqa: E402
from common import data  # noqa: E402

_, bank, queries = data.load("demo")
for name, size in (("raw pixels", 32), ("8 x 8 thumbnails", 8)):
    vectors = [F.normalize(F.adaptive_avg_pool2d(s.pixels.float() / 255 - 0.5, size).flatten(1)) for s in (bank, queries)]
    print(f"kNN on {name}: {script.knn((vectors[0], bank.labels), (vectors[1], queries.labels)):.3f}")
