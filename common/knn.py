"""A kNN classifier on frozen features: a cheap look at how training goes."""

import torch
import torch.nn.functional as F

from common import data

BANK, QUERIES = 10_000, 2_000  # images that answer and that ask, evenly spaced


@torch.no_grad()
def accuracy(backbone, bank, queries, size, workers, device):
    """Share of queries classified rightly. backbone: images -> (n, c), here in eval mode."""
    sets, training = [], backbone.training
    backbone.eval()
    for images, most in ((bank, BANK), (queries, QUERIES)):
        rows = torch.linspace(0, len(images) - 1, min(most, len(images))).long()
        sets.append(features(backbone, images, rows, size, workers, device))
    backbone.train(training)
    return vote(*sets)


def features(backbone, images, rows, size, workers, device):
    """Features of unit length (n, c) and labels (n,) of the images rows (n,)."""
    mean, std = (torch.tensor(s, device=device).view(3, 1, 1) for s in images.stats)
    crops = data.centres(images, rows, size, workers, device)
    encoded = [F.normalize(backbone((x - mean) / std)) for x in crops]
    return torch.cat(encoded), images.labels[rows].to(device)


def vote(bank, queries, k=200, temperature=0.1):
    """Share of queries whose class wins the vote of the k nearest in the bank, with weights
    exp(cosine / temperature). bank and queries: unit vectors (n, c) and labels (n,)."""
    (keys, labels), right = bank, 0
    for x, truth in zip(*(t.split(1000) for t in queries), strict=True):
        cosine, row = (x @ keys.T).topk(min(k, len(keys)))
        votes = torch.zeros(len(x), int(labels.max()) + 1, device=x.device)
        votes.scatter_add_(1, labels[row], (cosine / temperature).exp())
        right += (votes.argmax(1) == truth).sum().item()
    return right / len(queries[1])
