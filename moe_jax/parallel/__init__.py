"""How expert rows travel between devices.

`layout.py` says where groups and experts are, `exchange.py` moves rows in
slots, `ragged.py` those without.
"""
