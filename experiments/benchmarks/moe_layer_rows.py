"""The measurements of `bench_moe_layer`: a row of numbers for each case."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks import moe_layer_cases as cases_lib
from experiments.benchmarks import moe_layer_programs as programs_lib
from experiments.benchmarks import timing
from experiments.benchmarks.moe_layer_programs import (
  BATCHED,
  DENSE,
  DROPPING,
  EQUAL,
  GROUPED,
  LAYERS,
  PASSES,
  PLAIN_DENSE,
  RAGGED,
)
from experiments.benchmarks.roofline import Peaks, Work


def measure_setting(
  layer: cases_lib.Layer,
  compilations: Mapping[str, timing.Compilation],
  setting: Mapping[str, Any],
  peaks: Peaks,
  seconds: float,
) -> list[dict[str, Any]]:
  """Times all cases of one E, K, routing and pass; one row for each.

  Args:
    layer: Parameters of the layer.
    compilations: Compiled programs by name; see `compile_cases`.
    setting: E, K, routing and pass, by name; every row begins with them.
    peaks: Measured peaks of the machine.
    seconds: Approximate time for all cases, which are interleaved.
  """
  K, routing = setting['K'], setting['routing']
  inputs = cases_lib.Inputs.draw(layer, routing, K)
  programs = dict(cases_lib.bind(layer, compilations, inputs))
  times, peaks_by_round = timing.with_probes(
    {name: program.run for name, program in programs.items()},
    peaks,
    seconds=seconds,
  )
  rows = []
  for name, program in programs.items():
    row = dict(setting, case=name, **_numbers(times[name], program))
    for base in (DENSE, PLAIN_DENSE):
      ratio = timing.ratio(times[name], times[base])
      scale = 1 if name in (DENSE, PLAIN_DENSE) else K
      row |= _columns(f'per_{base}', ratio, scale)
    if name in LAYERS:
      limit = fastest_limit(times, name, routing)
      row['limit'] = limit
      row |= _columns('per_limit', timing.ratio(times[name], times[limit]))
      if RAGGED in times:
        ratio = timing.ratio(times[name], times[RAGGED])
        row |= _columns('per_ragged_dot', ratio)
    row['served'] = served_share(name, inputs.load)
    work = _work(layer.sizes, setting, name, row['served'])
    rows.append(row | timing.reached(times[name], work, peaks_by_round))
  return rows


def served_share(name: str, load: np.ndarray) -> float:
  """Share of all choices that are served.

  Layers of `DROPPING` have capacity factor 1 and drop what exceeds it; the
  others serve every choice.
  """
  if name not in DROPPING:
    return 1.0
  capacity = -(-load.sum() // len(load))
  return float(np.minimum(load, capacity).sum() / load.sum())


def fastest_limit(
  times: Mapping[str, Sequence[float]], layer: str, routing: str
) -> str:
  """Name of the fastest bare products of a layer's shapes, its limit.

  `gather` is compared to products of equal groups, which its slots are, and so
  is `sorted`, which has at most as many rows. `dropless` is compared to
  products of the drawn groups; under uniform routing, where these are equal but
  for chance, products of equal groups count for it too.
  """
  drawn_groups = [*GROUPED, RAGGED]
  equal = [*BATCHED, *(name + EQUAL for name in GROUPED)]
  names = equal if layer in DROPPING else drawn_groups
  if layer == 'dropless' and routing == 'uniform':
    names = drawn_groups + equal
  medians = {
    name: timing.Spread.of(times[name]).median
    for name in names
    if name in times
  }
  return min(medians, key=medians.__getitem__)


def _numbers(times: Sequence[float], program: timing.Program) -> dict[str, Any]:
  counts = program.counts
  return {
    'rounds': len(times),
    **_columns('ms', timing.Spread.of(times), 1e-3),
    'compile_seconds': program.compile_seconds,
    'xla_flops': counts.flops,
    'xla_bytes': counts.bytes_accessed,
    'temp_bytes': counts.temp_bytes,
    'output_bytes': counts.output_bytes,
  }


def _columns(
  name: str, ratio: timing.Spread, scale: float = 1
) -> dict[str, float]:
  return {
    name: ratio.median / scale,
    f'{name}_low': ratio.low / scale,
    f'{name}_high': ratio.high / scale,
  }


def _work(sizes, setting, name, served) -> Work:
  E, K = setting['E'], setting['K'] * served
  if name in (DENSE, PLAIN_DENSE):
    E, K = 1, 1
  backward = setting['pass'] == PASSES[True]
  return sizes.work(E, K, backward=backward, router=name in LAYERS)


def measure_scaling(
  sizes: programs_lib.Sizes,
  experts: Sequence[int],
  rows_per_expert: int,
  peaks: Peaks,
  seconds: float,
) -> list[dict[str, Any]]:
  """Times the layers with tokens in proportion to E; a row for each and E.

  Args:
    sizes: Sizes of the layer; its number of tokens is replaced.
    experts: Numbers of experts E.
    rows_per_expert: Number of tokens for each expert.
    peaks: Measured peaks of the machine.
    seconds: Approximate time for all rows, which are interleaved.
  """
  programs, works = {}, {}
  for E in experts:
    grown = dataclasses.replace(sizes, num_tokens=E * rows_per_expert)
    for name, program in _layer_programs(grown, E):
      programs[E, name] = program
      works[E, name] = grown.work(E, 1, backward=True, router=True)
  times, peaks_by_round = timing.with_probes(
    {key: program.run for key, program in programs.items()},
    peaks,
    seconds=seconds,
    least=3,
  )
  over_roofline = {
    key: [
      t / works[key].seconds(p)
      for t, p in zip(times[key], peaks_by_round, strict=True)
    ]
    for key in programs
  }
  return [
    {
      'E': E,
      'case': name,
      'tokens': E * rows_per_expert,
      **_numbers(times[E, name], program),
      **timing.reached(times[E, name], works[E, name], peaks_by_round),
      **_columns('over_roofline', timing.Spread.of(over_roofline[E, name])),
      **_columns(
        'growth',
        timing.ratio(over_roofline[E, name], over_roofline[experts[0], name]),
      ),
      'gradient_bytes': sizes.kernel_bytes(E),
    }
    for (E, name), program in programs.items()
  ]


def _layer_programs(
  sizes: programs_lib.Sizes, E: int
) -> Iterator[tuple[str, timing.Program]]:
  """Programs of the layers with K=1 and uniform routing, with gradient."""
  layer = cases_lib.Layer.draw(sizes, E)
  inputs = cases_lib.Inputs.draw(layer, 'uniform', 1)
  arrays = layer.params, inputs.x, inputs.dy
  for name in LAYERS:
    module = programs_lib.moe_layer(sizes, E, 1, name)
    function = programs_lib.layer_function(module, backward=True)
    yield name, timing.compile_ahead(function, *arrays).on(*arrays)
