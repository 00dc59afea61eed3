"""The dispatchers by name. Not here: any test."""

from moe_jax.dispatch import einsum, gather, sorted_rows

MOVERS = {'einsum': einsum, 'gather': gather, 'sorted_rows': sorted_rows}
# Those whose rows are [E, R, M]; the other's are sorted by expert.
WITH_SLOTS = ('einsum', 'gather')


def group_sizes(name, routing):
  """The rows of each expert; None where each has R."""
  return None if name in WITH_SLOTS else sorted_rows.group_sizes(routing)
