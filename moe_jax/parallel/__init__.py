"""How expert rows travel between devices.

`exchange.py` moves rows in slots, `ragged.py` those without.
"""
