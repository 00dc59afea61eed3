"""The model of `one_file_moe.py`, split over devices: data and experts.

    python colab/one_file_sharded.py

Sequences are split over all devices, and experts over the axis `expert`: each
device has E / (size of the axis) of them. The constraints of `MoE` say so,
and the compiler moves rows to their experts and back by all-to-all. Without
accelerators, eight devices are simulated on the CPU. The steps are compared
with those of one device.
"""

import os

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

import jax
import numpy as np
import one_file_moe as one
from jax.sharding import AxisType, NamedSharding, PartitionSpec

BATCH = PartitionSpec(('data', 'expert'))


def make_mesh(num_experts):
  """A mesh of all devices, whose axis `expert` divides the experts."""
  devices = len(jax.devices())
  expert = np.gcd(devices // 2 or 1, num_experts)
  shape, names = (devices // expert, int(expert)), ('data', 'expert')
  return jax.make_mesh(shape, names, (AxisType.Auto, AxisType.Auto))


def shardings(mesh, tree):
  """Experts [L / 2, E, ...] over their axis; each device has all the rest."""

  def of_leaf(path, leaf):
    is_expert = any('moe' in str(key) for key in path) and leaf.ndim == 4
    spec = PartitionSpec(None, 'expert') if is_expert else PartitionSpec()
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


def train(config, steps, mesh):
  """Trains on the mesh; returns parameters, losses and the program's text."""
  text, losses = one.read_text()[0], []
  with jax.set_mesh(mesh):
    batches = [
      jax.device_put(one.batch(text, config, i), NamedSharding(mesh, BATCH))
      for i in range(steps)
    ]
    init = one.Decoder(config).init(jax.random.key(0), batches[0][:, :-1])
    params = jax.device_put(init['params'], shardings(mesh, init['params']))
    opt_state = one.optimizer_of(config).init(params)
    compiled = one.train_step.lower(params, opt_state, batches[0], config)
    for tokens in batches:
      params, opt_state, log = one.train_step(params, opt_state, tokens, config)
      losses.append(float(log['nats']))
  return jax.device_get(params), losses, compiled.compile().as_text()


def main(config=one.Config(), steps=10):
  """Compares steps of all devices with those of one; returns differences."""
  mesh = make_mesh(config.num_experts)
  alone = jax.make_mesh((1, 1), mesh.axis_names, mesh.axis_types)
  params, losses, program = train(config, steps, mesh)
  expected, expected_losses, _ = train(config, steps, alone)
  leaves = zip(*map(jax.tree.leaves, (params, expected)), strict=True)
  of_params = max(np.abs(x - y).max() for x, y in leaves)
  of_losses = np.abs(np.subtract(losses, expected_losses)).max()
  print(
    f'{dict(mesh.shape)}, {program.count("all-to-all(")} all-to-all a step; '
    f'after {steps} steps losses differ from those of one device by at most '
    f'{of_losses:.1e}, parameters by {of_params:.1e}'
  )
  return of_losses, of_params


if __name__ == '__main__':
  main()
