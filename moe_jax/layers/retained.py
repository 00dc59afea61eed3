"""Options of sparse layers that have lost experts, for each layer by itself.

    retained.experts = '1:4, 3:6'
    retained.expert_of = '1: 0 1 1 2; 3: 0 1 0 2'

The first option says that layer 1 has 4 experts and layer 3 has 6; the second,
that the router of layer 1 has 4 columns (one for each logit), which lead to 3
merged experts. Pruning and merging (`moe_jax.compression`) write these options.
Where all layers have the same number of experts, and a router column for each,
`moe.num_experts` is that number, and these options are not needed.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

from moe_jax.config import Options, option
from moe_jax.errors import InputError
from moe_jax.layers.routers.contract import RouterOptions, Sizes

# For each option: the separator between layers, the pattern of the numbers
# after a layer's index, and an example.
_FORMS = {
  'experts': (',', r'\d+', '1:4'),
  'expert_of': (';', r'\d+(\s+\d+)*', '1: 0 1 1 2'),
}


@dataclasses.dataclass(frozen=True)
class Retained(Options):
  """The numbers of experts of layers in which pruning or merging left fewer."""

  experts: str = option(
    '',
    'Numbers of experts, and of router columns, of the sparse layers that have '
    "fewer than num_experts, each after the layer's number: '1:4, 3:6'.",
  )
  expert_of: str = option(
    '',
    'Experts that the num_experts columns of a router lead to in the sparse '
    "layers whose experts are merged: '1: 0 1 1 2; 3: 0 1 0 2' is, after each "
    "layer's number, the expert of every column.",
  )

  @classmethod
  def of(
    cls, counts: Mapping[int, int], rows: Mapping[int, tuple[int, ...]]
  ) -> 'Retained':
    """The options whose properties `counts` and `rows` have these values.

    By the index of a layer, `counts` has its number of experts, and `rows` the
    expert of each of its router's columns.
    """
    texts = (f'{i}: {" ".join(map(str, row))}' for i, row in rows.items())
    counts_text = ', '.join(f'{i}:{count}' for i, count in counts.items())
    return cls(counts_text, '; '.join(texts))

  @property
  def counts(self) -> Mapping[int, int]:
    """The number of experts of each pruned layer, by the layer's index."""
    entries = _entries('experts', self.experts)
    return {layer: count for layer, (count,) in entries.items()}

  @property
  def rows(self) -> Mapping[int, tuple[int, ...]]:
    """For each layer with merged experts, the expert of each router column."""
    return _entries('expert_of', self.expert_of)

  @property
  def layers(self) -> frozenset[int]:
    """The indices of the layers that have lost experts."""
    return frozenset(self.counts) | frozenset(self.rows)

  def like(self, layer: int) -> 'Retained':
    """The options of only the merged layers with as many experts as `layer`.

    `layer` is an index. Pruned layers are left out, so that equal layers have
    equal options; the result is empty if no expert of `layer` is merged.
    """
    experts = max(self.rows.get(layer, (-1,)))
    rows = {i: row for i, row in self.rows.items() if max(row) == experts}
    return Retained.of({}, rows)

  def problems(self) -> Iterator[str]:
    """Yields a text if options cannot be read or contradict each other."""
    try:
      counts, rows = self.counts, self.rows
    except InputError as error:
      yield str(error)
      return
    for layer in sorted(counts.keys() & rows.keys()):
      yield (
        f'layer {layer} is in experts={self.experts!r} and in expert_of: '
        'experts are merged before others are pruned, or neither'
      )
    for layer, row in rows.items():
      if missing := sorted(set(range(max(row) + 1)) - set(row)):
        yield (
          f'expert_of: layer {layer} has {max(row) + 1} experts, and no column '
          f'leads to {missing}'
        )

  def problems_with(self, router: RouterOptions, sizes: Sizes) -> Iterator[str]:
    """The reasons why these options do not fit the router or E, as texts."""
    E = sizes.num_experts
    for layer, count in self.counts.items():
      if not 1 <= count < E:
        yield (
          f'retained.experts: layer {layer} has {count} experts, not in [1, '
          f'num_experts={E}); leave out a layer that has them all'
        )
        continue
      fewer = dataclasses.replace(sizes, num_experts=count)
      for problem in router.problems_with(fewer):
        yield f'retained.experts: layer {layer}: {problem}'
    if self.rows and not router.has_columns:
      yield (
        f'retained.expert_of: the columns of {type(router).__name__} cannot '
        'lead to merged experts, as its tokens do not choose by one logit for '
        'each expert'
      )
    for layer, row in self.rows.items():
      if len(row) != E:
        yield (
          f'retained.expert_of: layer {layer} has {len(row)} columns, not '
          f'num_experts={E}'
        )

  def shrunk(self) -> 'Retained':
    """Options for a laptop's model, whose layers have all their experts."""
    return Retained()


@functools.cache
def _entries(name: str, text: str) -> Mapping[int, tuple[int, ...]]:
  """The numbers that an option's text gives to each layer, in layer order.

  `name` is that of the option, 'experts' or 'expert_of'. Raises ValueError for
  a text that cannot be read, or that names a layer twice.
  """
  separator, numbers, example = _FORMS[name]
  entries = {}
  for entry in text.split(separator) if text.strip() else ():
    if not re.fullmatch(rf'\d+\s*:\s*{numbers}', entry.strip()):
      raise InputError(
        f'{name}={text!r}: {entry.strip()!r} is no entry such as {example!r}'
      )
    layer, *values = map(int, re.findall(r'\d+', entry))
    if layer in entries:
      raise InputError(f'{name}={text!r}: layer {layer} comes twice')
    entries[layer] = tuple(values)
  return dict(sorted(entries.items()))
