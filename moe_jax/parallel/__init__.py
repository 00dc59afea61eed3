"""The travel of expert rows between devices.

`layout.py` says where groups and experts are, `exchange.py` moves rows in
slots, `ragged.py` moves rows without slots.
"""
