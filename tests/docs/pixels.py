"""kNN of the demo data on raw pixels and on 8 x 8 thumbnails, which a network has to beat:
python tests/docs/pixels.py"""

import sys
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import data, knn  # noqa: E402

if __name__ == "__main__":
    _, bank, queries = data.load("demo")
    for name, size in (("raw pixels", 32), ("8 x 8 thumbnails", 8)):
        sets = []
        for images in (bank, queries):
            x = F.adaptive_avg_pool2d(images.pixels / 255 - 0.5, size).flatten(1)
            sets.append((F.normalize(x), images.labels))
        print(f"kNN on {name}: {knn.vote(*sets):.3f}")
