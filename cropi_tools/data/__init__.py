"""What lies on disk, and nothing else: records and JSONL streams, manifests and resumable outputs, the gradient store (the only
user of zarr), policies as folders, and the formats of others (verl, the authors' files). Every other room reads and writes through
this one; it imports none of them.
"""
