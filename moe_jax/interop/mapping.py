"""Mapping between the tensors of a checkpoint and our variables.

Our variables are parameters and the state of routers. They stack all layers and
experts; a checkpoint has a tensor for each. An architecture has a table from
the path of our variable in a layer to names of tensors. Not here: the tables
(`mixtral.py` and its siblings), and reading of tensors (`loading.py`).
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

_ROWS = 1024  # rows of two tensors that are compared at a time


class Name(NamedTuple):
  """A tensor of a checkpoint.

  Attributes:
    theirs: The name of the tensor, with {layer} and {expert} if there is one
      for each.
    form: The layout in the checkpoint and here; see `Form`.
  """

  theirs: str
  form: str


# A table of tensor names. A key is the path of our variable in its collection,
# with 'layer' for the layer, such as 'decoder/layer/ffn/w_in'; its value has
# the alternative names of its tensors, of which the first is written.
Names = Mapping[str, tuple[Name, ...]]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One of our variables, and the tensors from which it is made.

  Attributes:
    path: The path of the variable, 'layers/layer_1/moe/experts/w_in'; no two
      collections have the same.
    shape: The shape of the variable.
    tensors: The name of each tensor, by the leading indices (of layers and
      experts) of its part of the parameter.
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
  names: Names,
  model: Model,
  variables: Mapping[str, Any],
  tensors: Sequence[str] = (),
) -> list[Leaf]:
  """The tensors of every variable.

  Args:
    names: The architecture's table.
    model: The model.
    variables: Its variables by collection, or their shapes.
    tensors: The names of the checkpoint's tensors, which decide among
      alternative names.

  Raises:
    ValueError: The architecture has no such parameters; they are listed.
  """
  have, every, without = set(tensors), [], []
  for keys, leaf in jax.tree_util.tree_leaves_with_path(variables):
    path = path_in_collection(keys)
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
    raise ValueError(f'variables {without} have no name there')
  return every


def path_in_collection(keys: tuple[Any, ...]) -> str:
  """The path of a variable in its collection; see `Leaf.path`."""
  return path_name(keys[1:])


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
  """The names of tensors in a checkpoint of the model without its head."""
  return {
    path: tuple(
      name._replace(theirs=name.theirs.removeprefix(prefix)) for name in spelled
    )
    for path, spelled in names.items()
  }


def embedding_tables(prefix: str = '') -> dict[str, tuple[Name, ...]]:
  """The names of the embeddings and the logits kernel of an encoder-decoder."""
  shared = Name(f'{prefix}shared.weight', 'V M')
  encoder = Name(f'{prefix}encoder.embed_tokens.weight', 'V M')
  decoder = Name(f'{prefix}decoder.embed_tokens.weight', 'V M')
  return {
    'embedding': (shared, encoder, decoder),
    'encoder_embedding': (encoder,),
    'w_logits': (Name('lm_head.weight', 'V M -> M V'),),
  }


def with_encoder_table(names: Names) -> Names:
  """The names of tensors if the encoder has an embedding of its own."""
  table = names['encoder_embedding'][0]
  _, *halves = names['embedding']
  return {**names, 'embedding': tuple(h for h in halves if h != table)}


def has_encoder_table(names: Names, files: TensorFiles) -> bool:
  """Whether encoder and decoder of a checkpoint have different embeddings.

  This is for embeddings that are not tied to logits: transformers then reads
  those of encoder and decoder, and not the shared one.
  """
  tables = [name.theirs for name in names['embedding']]
  first, *others = [name for name in tables if name in files.specs] or tables
  return any(not equal(files, first, other) for other in others)


def copies(names: Names, found: Sequence[Leaf]) -> dict[str, str]:
  """Tensors that may repeat the embedding, each with the one that is read.

  They are the alternatives of the embedding and, if it is tied to logits, the
  logits kernel.
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
  """The problems between our parameters and a checkpoint's tensors, as texts.

  Args:
    found: Our parameters.
    files: The files of the checkpoint.
    copies: For tensors that may repeat another, the tensor that they have to
      equal; see `copies`.
    computed: Patterns of the names of tensors that need not be read, as their
      values are computed.
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
  """Whether two tensors are equal; a few rows are read at a time."""
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
