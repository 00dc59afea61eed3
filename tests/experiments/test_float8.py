"""Operands in 8-bit floats: exact numbers, shared scales, rounded gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.study.float8 import Float8Layer, Rounding, rounded
from moe_jax.layers.ffn import FfnOptions

same = np.testing.assert_array_equal
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
E5M2 = Rounding('e5m2', 'row')


def draws(*shapes):
  return [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes)]


def test_rounded_numbers_are_told():
  # The largest e4m3 number is 448, so that the scale is 1. Between 16 and 32
  # numbers are 2 apart, half to even; the smallest above 0 is 2^-9.
  x = jnp.array([[448, 17, 19, -17.1, 0.0021, 0.0009]])
  y = jnp.array([[448, 16, 20, -18, 2**-9, 0]])
  e4m3 = jax.jit(lambda x: rounded(x, 'e4m3', (0, 0)))  # compiled, too
  for scale in (1, 1 / 64, 0):
    same(e4m3(scale * x), scale * y)
  x = jnp.array([[57344.0, 17, 19, 0.25]])  # 4 apart between 16 and 32
  same(rounded(x, 'e5m2', (0, 0)), [[57344, 16, 20, 0.25]])


def test_a_small_row_keeps_its_digits_by_a_scale_of_its_own():
  x, small = jnp.array([[448.0, 17]] * 2) * jnp.array([[1], [2**-18]]), 2**-18
  by_row, lost = [[448, 16], [448 * small, 16 * small]], [[448, 16], [2**-9, 0]]
  same(Rounding('e4m3', 'row')(x, -1), by_row)
  same(Rounding('e4m3', 'tensor')(x, -1), lost)
  tile = Rounding('e4m3', 'tile')
  same(tile(x, -1), by_row)  # 1 x 128 of activations
  kernels = jnp.stack([x, small * x])  # 128 x 128 of each expert's kernel
  same(tile(kernels, -2, is_kernel=True), np.multiply([[[1]], [[small]]], lost))


def test_each_product_of_the_gradient_rounds_its_own_operands():
  x, w, dy = draws((5, 3), (3, 4), (5, 4))
  y, pull = jax.vjp(functools.partial(E5M2.product, jnp.matmul), x, w)
  close(y, E5M2(x, 1) @ E5M2(w, 0))
  dx, dw = pull(dy)
  close(dx, E5M2(dy, 1) @ E5M2(w, 1).T)
  close(dw, E5M2(x, 0).T @ E5M2(dy, 0))
  # Each direction of a wire is rounded by itself.
  for ahead, back in ((True, False), (False, True)):
    y, pull = jax.vjp(functools.partial(E5M2.sent, ahead=ahead, back=back), x)
    close(y, E5M2(x, 1) if ahead else x)
    close(pull(x)[0], E5M2(x, 1) if back else x)


@pytest.mark.parametrize('chosen', ['w_gate', 'w_in', 'w_out', ''])
def test_other_products_are_bit_for_bit_the_same(chosen):
  names = 'w_gate', 'w_in', 'w_out'
  x, *kernels = draws((5, 6), (2, 6, 7), (2, 6, 7), (2, 7, 6))
  layer = Float8Layer(
    FfnOptions(7, 'swiglu'), rounding=E5M2, products=(chosen,)
  )
  outputs = []
  for e, rows in enumerate((x[:2], x[2:])):
    p = {name: w[e] for name, w in zip(names, kernels, strict=True)}
    gate, up, down = (
      functools.partial(E5M2.product, jnp.matmul) if name == chosen
      else jnp.matmul for name in names
    )  # fmt: skip
    h = jax.nn.silu(gate(rows, p['w_gate'])) * up(rows, p['w_in'])
    outputs.append(down(h, p['w_out']))
    same(layer.compute(p, rows), outputs[e])
  p = dict(zip(names, kernels, strict=True))
  close(layer.compute_sorted(p, x, jnp.array([2, 3])), jnp.concatenate(outputs))
