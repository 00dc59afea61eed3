"""Which tensors of a checkpoint make which of our parameters.

Our layers are stacked, theirs are one tensor a layer and expert; an
architecture names theirs by a table, from our path in a layer. Not here: the
tables (`mixtral.py` and its siblings), and the moving (`loading.py`).
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.interop.forms import Form
from moe_jax.interop.tensor_files import FLOATS, TensorFiles
from moe_jax.models import Model
from moe_jax.partitioning import path_name

_ROWS = 1024  # of tables compared at a time


class Name(NamedTuple):
  """A tensor of a checkpoint.

  Attributes:
    theirs: The name of the tensor, with {layer} and {expert} where it is one
      of several.
    form: The layout there and here; see `Form`.
  """

  theirs: str
  form: str


# The key is our path, with 'layer' in place of stack and number, such as
# 'decoder/layer/ffn/w_in'; the value has the spellings of its tensors, first
# the one that is written.
Names = Mapping[str, tuple[Name, ...]]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One of our parameters and the tensors it is made of.

  Attributes:
    path: The path of the parameter, 'layers/layer_1/moe/experts/w_in'.
    shape: The shape of the parameter.
    tensors: The name of each tensor, by the leading indices (of layers and
      experts) of the part of the parameter that it is.
    form: The layout of each tensor.
  """

  path: str
  shape: tuple[int, ...]
  tensors: Mapping[tuple[int, ...], str]
  form: Form

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """The shape that each tensor must have."""
    return self.form.their_shape(self.shape[self.num_stacked :])

  @property
  def num_stacked(self) -> int:
    """The number of leading dimensions along which tensors are stacked."""
    return len(next(iter(self.tensors)))


def leaves(
  names: Names, model: Model, params: Any, tensors: Sequence[str] = ()
) -> list[Leaf]:
  """The tensors of every parameter.

  Args:
    names: The architecture's table.
    model: The model.
    params: Its parameters, or their shapes.
    tensors: The names of the checkpoint's tensors, which choose among
      spellings.

  Raises:
    ValueError: The architecture has no such parameters; they are listed.
  """
  have, every, without = set(tensors), [], []
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
    path = path_name(keys)
    key, layers = path, (None,)
    place = model.place_of(tuple(path.split('/')))
    if place is not None:
      layers = place.layers
      key = '/'.join((*place.stack, 'layer', *place.name))
    if key not in names:
      without.append(path)
      continue
    spelled = [
      Leaf(
        path, leaf.shape, _numbered(name, leaf.shape, layers),
        Form.parse(name.form),
      )
      for name in names[key]
    ]  # fmt: skip
    every.append(
      next((s for s in spelled if have & set(s.tensors.values())), spelled[0])
    )
  if without:
    raise ValueError(f'parameters {without} have no name there')
  return every


def _numbered(name, shape, layers) -> dict[tuple[int, ...], str]:
  experts = (None,)
  if '{expert}' in name.theirs:
    experts = range(shape[0 if layers == (None,) else 1])
  numbered = {}
  for (r, layer), expert in itertools.product(enumerate(layers), experts):
    index = () if layer is None else (r,)
    index += () if expert is None else (expert,)
    numbered[index] = name.theirs.format(layer=layer, expert=expert)
  return numbered


def without_prefix(names: Names, prefix: str) -> Names:
  """The names that a checkpoint of the bare model has."""
  return {
    path: tuple(
      name._replace(theirs=name.theirs.removeprefix(prefix)) for name in spelled
    )
    for path, spelled in names.items()
  }


def with_encoder_table(names: Names) -> Names:
  """The names where the encoder has an embedding of its own."""
  table = names['encoder_embedding'][0]
  _, *halves = names['embedding']
  return {**names, 'embedding': tuple(h for h in halves if h != table)}


def has_encoder_table(names: Names, files: TensorFiles) -> bool:
  """Whether the embeddings of a checkpoint's halves differ.

  It is asked where embeddings are not tied: transformers then reads what the
  halves have, and not what they would share.
  """
  tables = [name.theirs for name in names['embedding']]
  first, *others = [name for name in tables if name in files.specs] or tables
  return any(not equal(files, first, other) for other in others)


def copies(names: Names, found: Sequence[Leaf]) -> dict[str, str]:
  """The tensor that is read in place of each that may repeat the embedding.

  The other spellings of the embedding may; those of the logits' kernel may
  where it is tied.
  """
  read = {leaf.path: leaf for leaf in found}
  spelled = list(names['embedding'])
  if 'w_logits' not in read:
    spelled += names['w_logits']
  used = read['embedding'].tensors[()]
  return {name.theirs: used for name in spelled if name.theirs != used}


def check(
  found: Sequence[Leaf],
  files: TensorFiles,
  copies: Mapping[str, str],
  computed: Sequence[str],
) -> list[str]:
  """All that is wrong between our parameters and a checkpoint's tensors.

  Args:
    found: Our parameters.
    files: The files of the checkpoint.
    copies: The tensor that each tensor which may be there has to equal.
    computed: Patterns of the names of tensors that hold what is computed
      anyway.
  """
  problems, used = [], set()
  for leaf in found:
    wanted = leaf.tensor_shape
    for name in leaf.tensors.values():
      used.add(name)
      spec = files.specs.get(name)
      if spec is None:
        problems.append(f'missing: {name} {list(wanted)}, for {leaf.path}')
      elif spec.dtype not in FLOATS:
        problems.append(f'type: {name} is {spec.dtype}, none of {list(FLOATS)}')
      elif spec.shape != wanted:
        problems.append(
          f'shape: {name} is {list(spec.shape)}, the config asks for '
          f'{list(wanted)}'
        )
  for name in files.specs.keys() - used:
    if name in copies and copies[name] in files.specs:
      if not equal(files, name, copies[name]):
        problems.append(f'tied: {name} differs from {copies[name]}')
    elif not any(re.search(pattern, name) for pattern in computed):
      problems.append(f'unknown: {name} {list(files.specs[name].shape)}')
  return sorted(problems)


def equal(files: TensorFiles, a: str, b: str) -> bool:
  """Whether two tensors are equal, read a few rows at a time."""
  if files.specs[a].shape != files.specs[b].shape:
    return False
  rows, *rest = files.specs[a].shape
  for start in range(0, rows, _ROWS):
    index = (
      slice(start, min(start + _ROWS, rows)),
      *(slice(0, size) for size in rest),
    )
    if not np.array_equal(files.read(a, index), files.read(b, index)):
      return False
  return True
