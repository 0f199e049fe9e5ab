"""What lies in a bucket: index.json, page tables and shards."""

from dataclasses import dataclass


@dataclass(frozen=True)
class IndexOptions:
    """Options of `naign index` and of `indexing.index`; the comments are their help."""

    to: str = ""  # Folder or s3://bucket/prefix to write to, for --data.index; default: beside the tars.
    test: str = ""  # Pattern of the tars for testing; default: those with test or val in their names.
    label: str = ""  # Where labels are: json:FIELD of the .json; default: the number in .cls.
    name: str = ""  # Name of the data set; default: the last part of the path.
    sample_check: int | None = None  # Pictures of each tar to decode, of the others only the header; default: all.
    keep_broken: bool = False  # Only warn of samples that cannot be decoded; train with --data.broken=skip.
    force: bool = False  # Replace an existing index.json.
