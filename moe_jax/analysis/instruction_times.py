"""The time of each instruction of a compiled program, read from a profile."""

import collections
import glob
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax

# libtpu lists planes of its own beside those of the devices.
_ACCELERATORS = ('/device:TPU', '/device:GPU')
# A TPU repeats the same times by step, module and scope on other lines.
_LINES = ('XLA Ops', 'Stream')


def measure(run: Callable[[], object], module: str) -> dict[str, float]:
  """Seconds of each instruction of a program while `run()` runs, by name.

  On accelerators they include work that the profile lists without an
  instruction, under the name of its kernel.

  Args:
    run: Runs the program.
    module: Name of the program's XLA module; instructions of others are left
      out.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    # This loads every installed plugin: a libtpu of another version than jax
    # asks for crashes here, where JAX_PLATFORMS=cpu does not.
    with jax.profiler.trace(folder, profiler_options=options):
      run()
    (path,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
    profile = jax.profiler.ProfileData.from_file(path)
  planes = list(profile.planes)
  devices = [plane for plane in planes if plane.name.startswith(_ACCELERATORS)]
  seconds: dict[str, float] = collections.defaultdict(float)
  for plane in devices or planes:
    for name, duration in _operations(plane, module, bool(devices)):
      seconds[name] += duration
  return dict(seconds)


def _operations(
  plane: Any, module: str, on_accelerator: bool
) -> Iterator[tuple[str, float]]:
  """The name and the seconds of each operation in a plane of a profile."""
  for line in plane.lines:
    if on_accelerator and not line.name.startswith(_LINES):
      continue
    for event in line.events:
      stats = dict(event.stats)
      name = stats.get('hlo_op')
      if name is None and on_accelerator:
        name = event.name.removeprefix('%').split(' ')[0]
      elif name is None or stats.get('hlo_module', module) != module:
        continue
      yield str(name), event.duration_ns / 1e9
