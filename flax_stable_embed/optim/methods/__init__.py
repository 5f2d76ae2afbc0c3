"""One file per optimizer, with the same parts in the same order: state, update rule, engine, `scale_by_*8bit`, `*8bit`.

`arithmetic.py` and `trust_ratio.py` have the functions that several update rules share.
"""
