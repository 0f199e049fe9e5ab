"""Do samples look like the data, do they cover all of it, and are they copies of training data? Read them together.

precision, recall      improved precision and recall, Kynkaanniemi et al. 2019 (arXiv 1904.06991)
density, coverage      Naeem et al. 2020 (arXiv 2002.09797)
modes                  share of each class among the samples, as the encoder's classifier sees them
nearest                distance to the nearest training image: samples nearer than unseen test images are copies

A classifier maps all of pure noise close to one point: an untrained network can have precision 0.99 at recall 0.
Sets are centred first: squared distances, expanded in float32, |a|^2 + |b|^2 - 2ab, cancel under a large offset.
"""

import torch
from torch import Tensor

from naign import match
from naign.match.exact import squares

NEIGHBOURS = 5  # k of precision, recall, density and coverage
BLOCK = 1000  # rows of a distance matrix held at a time: 1,000 x 10,000 float32 are 40 MB


def radii(features: Tensor) -> Tensor:
    """(n, d) -> (n,): squared distance of every point to the last of its NEIGHBOURS nearest others of the same set."""
    parts = []
    for start in range(0, len(features), BLOCK):
        block = squares(features[start : start + BLOCK], features)
        block.diagonal(start).zero_()  # exactly, whatever the rounding: the point itself is the first of k + 1
        smallest = block.topk(NEIGHBOURS + 1, dim=1, largest=False).values  # kthvalue is nine times slower
        parts.append(smallest[:, NEIGHBOURS])
    return torch.cat(parts)


def coverage(real: Tensor, samples: Tensor) -> dict[str, float]:
    """How features (n, d) of real data and (m, d) of samples overlap; both need more than k = NEIGHBOURS rows.

    precision and recall: share of samples in the k-nearest-neighbour balls of real data, and of real data in those of
    samples. density: mean number of real balls that hold a sample, over k, precision that outliers do not inflate; 1
    for equal sets. coverage: share of real balls that hold a sample, recall that stray samples do not inflate.
    """
    if min(len(real), len(samples)) <= NEIGHBOURS:
        raise ValueError(f"{len(real)} real and {len(samples)} sampled rows: both must be more than k = {NEIGHBOURS}")
    real = real.double()
    centre = real.mean(0)
    real = (real - centre).float()
    samples = (samples.double() - centre).float()
    real_radii = radii(real)
    sample_radii = radii(samples)
    inside = torch.zeros(len(samples), dtype=torch.int64)  # real balls that hold the sample
    recalled = 0
    covered = 0
    for part, reach in zip(real.split(BLOCK), real_radii.split(BLOCK), strict=True):
        block = squares(part, samples)
        holds = block <= reach[:, None]
        inside += holds.sum(0)
        covered += int(holds.any(1).sum())
        recalled += int((block <= sample_radii).any(1).sum())
    return {
        "precision": float((inside > 0).double().mean()),
        "recall": recalled / len(real),
        "density": float(inside.double().mean()) / NEIGHBOURS,
        "coverage": covered / len(real),
    }


def mode_shares(logits: Tensor) -> list[float]:
    """(n, classes) logits -> share of samples whose most likely class is each class; they add up to 1."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return (counts.double() / len(logits)).tolist()


def nearest(queries: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """(q, ...), (n, ...) float32 -> L2 distance (q,) float32 and index (q,) int64 of each query's nearest reference."""
    distances, indices = match.nearest(queries.flatten(1), reference.flatten(1), 0)
    return distances.sqrt(), indices
