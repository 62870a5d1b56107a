"""What `inlay bench compare` runs beside Inlay: other engines, each in an environment of its own.

`environments.py` and `prepared.py` are ours; `serve.py` and the `*_peer.py` beside it run in a
peer's own Python, which has no inlay, so they import the standard library and the peer alone.
"""
