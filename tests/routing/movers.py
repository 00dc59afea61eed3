"""Dispatchers by name, and their programs; this module has no tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.routing.dispatch import einsum, gather, sorted_rows

MOVERS = {'einsum': einsum, 'gather': gather, 'sorted_rows': sorted_rows}
# Rows of these dispatchers are [E, R, M]; the other sorts its rows by expert.
WITH_SLOTS = ('einsum', 'gather')


def group_sizes(name, routing):
  """Number of rows of each expert, or None if every expert has R rows."""
  return None if name in WITH_SLOTS else routing.rows_per_expert()


@functools.partial(jax.jit, static_argnums=0)
def both_directions(name, routing, slot_of_row, x, dy, rows, d_rows):
  """Both directions of one dispatcher, with all gradients.

  The caller's rows are [E, R, M] with every dispatcher; `slot_of_row` gives the
  place among them of each row of the sorted ones.
  """
  mover = MOVERS[name]
  slotted = group_sizes(name, routing) is None

  def send(x):
    sent = mover.dispatch(x, routing)
    if slotted:
      return sent
    num_experts, num_rows, width = rows.shape
    slots = jnp.zeros((num_experts * num_rows, width), sent.dtype)
    return slots.at[slot_of_row].set(sent, mode='drop').reshape(rows.shape)

  def combine(rows, gate):
    if not slotted:
      flat = rows.reshape(-1, rows.shape[-1])
      rows = jnp.take(flat, slot_of_row, 0, mode='fill', fill_value=0)
    return mover.combine(rows, dataclasses.replace(routing, gate=gate))

  sent, dispatch_vjp = jax.vjp(send, x)
  y, combine_vjp = jax.vjp(combine, rows, routing.gate)
  return sent, dispatch_vjp(d_rows)[0], y, *combine_vjp(dy)
