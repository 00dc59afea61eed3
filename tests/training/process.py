"""A program for `test_processes`: one of several processes that train.

    python -m tests.training.process <coordinator> <processes> <id> <jobs.json>

Each job is a dict of arguments of `run`.
"""

import dataclasses
import gc
import hashlib
import json
import os
import pathlib
import resource
import signal
import sys
import time

import jax

TIMEOUTS = {'heartbeat_timeout_seconds': 15}


def configure(num_devices):
  """Makes those settings of `tests/conftest.py` that no variable carries."""
  gc.set_threshold(50_000, 10, 10)
  jax.config.update('jax_num_cpu_devices', num_devices)
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def digest(batch):
  """The sha256 of a batch of numpy arrays."""
  text = hashlib.sha256()
  for name in sorted(batch):
    text.update(name.encode() + batch[name].tobytes())
  return text.hexdigest()


def interleaved(devices):
  """Orders devices so that neighbours belong to different processes."""
  return sorted(devices, key=lambda d: (d.id % 2048, d.process_index))


def recorder():
  """A hook that records the digest of each step's global batch."""
  from moe_jax.devices import fetch
  from moe_jax.training.setup import Hook

  class Recorded(Hook):
    def start(self, run):
      self.batches, self.run = [], run
      train_step = run.train_step

      def step(state, batch):
        self.batches.append(digest(fetch(batch)))
        return train_step(state, batch)

      return dataclasses.replace(run, train_step=step)

  return Recorded()


def accident(process, kind, at_step):
  """A hook that makes something happen to a process before a step.

  Step 0 is the first; what happens before it precedes every check of whether to
  stop. 'SIGTERM_evaluating' happens in the evaluation after the step.
  """
  from moe_jax.training.setup import Hook, Run

  def befall():
    if process != jax.process_index():
      return
    if kind == 'stuck':
      while True:
        time.sleep(0.01)
    if kind == 'SIGTERM_evaluating':
      os.kill(os.getpid(), signal.SIGTERM)
      return
    if kind == 'full_disk':
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
      return
    os.kill(os.getpid(), getattr(signal, kind))

  def for_long(entry):
    def measure(variables, step):
      if step == at_step:
        befall()
        for _ in range(1000):  # JAX sees a signal only after a second
          entry.measure(variables, step)
      return entry.measure(variables, step)

    return dataclasses.replace(entry, measure=measure)

  class Accident(Hook):
    def start(self, run):
      if at_step == 0:
        befall()
      if kind == 'SIGTERM_evaluating':
        evaluations = [for_long(entry) for entry in run.evaluations]
        return dataclasses.replace(run, evaluations=evaluations)

      class WithAccident(Run):
        def batches(self, start):
          for step, batch in enumerate(super().batches(start), start + 1):
            if step == at_step:
              befall()
            yield batch

      return WithAccident(**vars(run))

  return Accident()


def run(
  within,
  workdir,
  overrides,
  befalls=(),
  order='',
  hooks=False,
  evals=(),
  seeds=(0, 0),
):
  """Runs one job.

  Args:
    within: Folder of all jobs.
    workdir: Name of the run's folder in it.
    overrides: Overrides of `tiny.config`.
    befalls: Arguments [process, kind, step] of `accident`.
    order: 'interleaved' orders devices by `interleaved`; '' keeps their order.
    hooks: Whether the main program's hooks and evaluations run too.
    evals: Options of evaluations that are added to `config.evals`, by kind;
      None keeps those.
    seeds: `config.seed` of each process.
  """
  from moe_jax import run_config
  from moe_jax.configs import base
  from moe_jax.training.loop import train_and_evaluate
  from tests.training import tiny

  config = tiny.config(**overrides)
  config.seed = [*seeds, 0, 0][jax.process_index()]
  if evals == ():
    config.evals, config.checkpoint.keep_best = {}, False
  for kind, options in dict(evals or {}).items():
    config.evals[kind] = getattr(base, f'{kind}_evaluation')(**options)
  recorded = recorder()
  run_hooks = [recorded]
  if hooks:
    from moe_jax.analysis import hooks as hooks_lib

    run_hooks += hooks_lib.default_hooks()
  if befalls:
    run_hooks.append(accident(*befalls))
  folder = pathlib.Path(within) / workdir
  state = train_and_evaluate(
    run_config.read(config),
    folder,
    hooks=run_hooks,
    resume=True,
    devices=interleaved(jax.devices()) if order else None,
  )
  rows = recorded.run.programs.put.rows.tolist()
  return {'step': int(state.step), 'batches': recorded.batches, 'rows': rows}


def main(coordinator, num_processes, process_id, path):
  from moe_jax import devices

  spec = json.loads(pathlib.Path(path).read_text())
  within = pathlib.Path(path).parent
  configure(spec['devices'])
  timeouts = {**TIMEOUTS, **spec.get('timeouts', {})}
  address = coordinator, int(num_processes), int(process_id)
  with devices.connected(devices.Timeouts(**timeouts), *address):
    for job in spec['jobs']:
      job['overrides'] |= {'distributed': timeouts}
      with open(f'{path}.{process_id}', 'a') as file:
        file.write(json.dumps(run(within, **job)) + '\n')


if __name__ == '__main__':
  main(*sys.argv[1:])
