"""The ledger's archive: Parquet segments with a manifest, in a directory or an object store.

Owns: the files, their schema, what reads and rewrites them. Does not own: the stream they are made from and its
trimming (worker/compaction.py), who may read what (service). One process writes, holding a lease; any number read.

    groups/tenant=default/day=2026-11-22/route=default/segment-<first id>-<last id>.parquet
    outcomes/…   feedback/…   exposures/…      the same scheme, one set for each kind of record
    _manifest/2026-11-22.json                  the batches of that day: what is not named there does not exist
"""
