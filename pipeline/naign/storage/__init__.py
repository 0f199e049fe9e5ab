"""Files by name, in a local folder or under s3://bucket/prefix, behind one protocol: written whole or not at all."""
