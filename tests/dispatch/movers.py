"""Modules of the dispatchers by name; this module has no tests."""

from moe_jax.dispatch import einsum, gather, sorted_rows

MOVERS = {'einsum': einsum, 'gather': gather, 'sorted_rows': sorted_rows}
# Rows of these dispatchers are [E, R, M]; the other sorts its rows by expert.
WITH_SLOTS = ('einsum', 'gather')


def group_sizes(name, routing):
  """Number of rows of each expert, or None if every expert has R rows."""
  return None if name in WITH_SLOTS else sorted_rows.group_sizes(routing)
