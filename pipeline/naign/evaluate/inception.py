"""FID and KID on Inception with the weights that papers use, by torch-fidelity (arXiv 1706.08500, 1801.01401).

They compare with a paper's numbers where the paper takes as many samples, the same training images and these weights.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from naign.data.scale import eight_bits
from naign.errors import InputError, Unavailable, one_line, require

FEWEST = 2048  # samples and training images: with fewer the covariance of as many features is singular
MOST = 2**24  # of either, whose features are 128 GB
DOWNLOAD = "download"  # in place of a file of weights
HASH = "6726825d"  # of the file of the published weights begins so
BATCH = 100  # images seen at once
_LAYER = "2048"


def open_inception(weights: str, device: str) -> nn.Module:
    """torch-fidelity's Inception with the weights of a file, or of its release on GitHub where `weights` is `download`.

    Nothing in the file is executed. Raises InputError without torch-fidelity, and for a file of something else;
    Unavailable where the download fails.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(f"--fid needs torch-fidelity ({error}): pip install torch-fidelity") from None
    file = Path(URL_INCEPTION_V3).name
    source = f"give the file {file} of torch-fidelity's release v0.2.0 as --fid FILE"
    if weights == DOWNLOAD:
        try:
            state = torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3,
                map_location="cpu",
                check_hash=True,
                weights_only=True,
            )
        except Exception as error:  # the network's, or a file that is not what its name says
            raise Unavailable(f"Inception's weights cannot be downloaded ({one_line(error)}): {source}") from None
    elif not Path(weights).is_file():
        raise InputError(f"--fid: there is no file {weights}: {source}, or say --fid {DOWNLOAD}")
    else:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception:  # whatever the file holds
            raise InputError(f"--fid: {weights} holds no weights, or runs code: {source}") from None
    with tempfile.NamedTemporaryFile(suffix=".pth") as checked:  # torch-fidelity itself would unpickle anything
        torch.save(state, checked.name)
        try:
            network: nn.Module = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                [_LAYER],
                feature_extractor_weights_path=checked.name,
            )
        except Exception as error:  # of other names and shapes
            other = f"--fid: {weights} holds another network's weights ({one_line(error)})"
            raise InputError(f"{other}: {source}") from None
    network.to(device)
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    finite = bool(features_of(network, black).isfinite().all())
    require((finite, f"--fid: {weights} holds numbers that are not finite: {source}"))
    return network


def note_on(weights: str) -> list[str]:
    """What is to be said of a file whose weights are not the published ones."""
    if weights == DOWNLOAD or hashlib.sha256(Path(weights).read_bytes()).hexdigest().startswith(HASH):
        return []
    return ["FID and KID are on weights that are not the published ones: they compare with no paper's numbers."]


def check_count(what: str, count: int) -> None:
    """InputError for fewer images than FID needs, whose distances are mostly bias, or more than memory holds."""
    if not FEWEST <= count <= MOST:
        raise InputError(f"--fid needs at least {FEWEST:,} {what} and at most {MOST:,}, not {count:,}: few give bias")


def features_of(network: nn.Module, images: Tensor) -> Tensor:
    """(n, C, H, W) uint8, or float32 in [-1, 1] -> (n, 2048) float32. Grey images are all three channels."""
    device = next(network.parameters()).device
    if images.dtype != torch.uint8:
        images = eight_bits(images)
    parts = []
    for part in images.expand(-1, 3, -1, -1).split(BATCH):
        (found,) = network(part.to(device))
        parts.append(found.cpu())
    return torch.cat(parts)


def inception_distances(samples: Tensor, train: Tensor) -> dict[str, Any]:
    """FID and KID of features (n, 2048) and (m, 2048). KID is a mean over 100 subsets of 1,000, with its deviation."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    statistics = [fid_features_to_statistics(features) for features in (samples, train)]
    found = fid_statistics_to_metric(*statistics, verbose=False)
    found |= kid_features_to_metric(samples, train, verbose=False)
    return {
        "samples": len(samples),
        "train": len(train),
        "fid": found[KEY_METRIC_FID],
        "kid": found[KEY_METRIC_KID_MEAN],
        "kid_deviation": found[KEY_METRIC_KID_STD],
    }
