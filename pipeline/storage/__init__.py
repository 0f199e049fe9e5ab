"""Files by name, in a local folder or under s3://bucket/prefix, behind one protocol: written whole or not at all."""

from pipeline.storage.base import Store, Writer
from pipeline.storage.local import UMASK, sync_file, write_atomically
from pipeline.storage.prefetch import in_background
from pipeline.storage.retry import Tally, at_most
from pipeline.storage.store import open_store, use_endpoint
