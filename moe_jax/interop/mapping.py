"""Mapping between the tensors of a checkpoint and our variables.

Our variables are parameters and the state of routers. A variable stacks all
layers and experts; a checkpoint has a tensor for each layer and expert. An
architecture has a table from the path of our variable in a layer to names of
tensors.

Layouts are written in letters, the checkpoint's before the arrow and ours after
it. `'(H D) M -> M H D'` is for a linear layer that PyTorch stores as [out, in]
and whose output has H heads of width D. `'E (1/2 F) M -> E M F'` takes block 1
of 2, the second half, of the second dimension, and `'E M (F 0/2) -> E M F'`
every second value of the third, from the first on.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.errors import InputError
from moe_jax.interop.tensor_files import FLOATS, Index, TensorFiles
from moe_jax.models import Model
from moe_jax.partitioning import path_name

_GROUP = re.compile(r'\(([^)]*)\)|(\S+)')


@dataclasses.dataclass(frozen=True)
class Form:
  """The layout of a tensor in a checkpoint ("theirs") and here ("ours").

  Attributes:
    theirs: The letters that each dimension of their tensor consists of,
      outermost first; in place of a letter, 'k/n' is block k of n.
    ours: The letters of our dimensions, in order.
  """

  theirs: tuple[tuple[str, ...], ...]
  ours: tuple[str, ...]

  @classmethod
  @functools.cache
  def parse(cls, text: str) -> 'Form':
    """Parses 'theirs -> ours'; without an arrow both layouts are equal.

    Raises ValueError if they differ in their letters.
    """
    their_text, _, our_text = text.partition('->')
    groups = [
      tuple((inside or alone).split())
      for inside, alone in _GROUP.findall(their_text)
    ]
    our_letters = tuple((our_text or their_text).split())
    letters = [part for group in groups for part in group if '/' not in part]
    if sorted(letters) != sorted(our_letters):
      raise InputError(f'form {text!r}: the two sides differ in their letters')
    return cls(tuple(groups), our_letters)

  def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor if our tensor has `shape`."""
    sizes = self._sizes(shape)
    return tuple(
      int(np.prod([sizes[part] for part in group])) for group in self.theirs
    )

  def read(
    self,
    read_slice: Callable[[Index], np.ndarray],
    shape: Sequence[int],
    index: Index,
  ) -> np.ndarray:
    """Reads a slice of our tensor from the needed slice of the checkpoint's.

    Args:
      read_slice: Returns, for an index, a copy of that slice of their tensor.
      shape: The shape of our whole tensor.
      index: The slice of each dimension of our tensor; bounds are not None.
    """
    sizes = self._sizes(shape)
    letter_bounds = {
      letter: (part.start, part.stop)
      for letter, part in zip(self.ours, index, strict=True)
    }
    bounds = {part: letter_bounds.get(part) or _block(part) for part in sizes}
    slices, split_shape, inner_index = [], [], []
    for group in self.theirs:
      first, *rest = group
      low, high = bounds[first]
      stride = int(np.prod([sizes[part] for part in rest], dtype=np.int64))
      slices.append(slice(low * stride, high * stride))
      split_shape += [high - low, *(sizes[part] for part in rest)]
      inner_index += [slice(None), *(slice(*bounds[part]) for part in rest)]
    part = read_slice(tuple(slices)).reshape(split_shape)[tuple(inner_index)]
    letters = [letter for group in self.theirs for letter in group]
    block_axes = tuple(i for i, letter in enumerate(letters) if '/' in letter)
    letters = [letter for letter in letters if '/' not in letter]
    axes = [letters.index(letter) for letter in self.ours]
    return part.squeeze(axis=block_axes).transpose(axes)

  @property
  def num_blocks(self) -> int:
    """The number of our tensors that are blocks of the checkpoint's tensor."""
    parts = [part for group in self.theirs for part in group if '/' in part]
    return math.prod(int(part.split('/')[1]) for part in parts)

  def write(self, tensor: np.ndarray, array: np.ndarray) -> None:
    """Writes our array into its block of the checkpoint's contiguous tensor."""
    sizes = self._sizes(array.shape)
    parts = [part for group in self.theirs for part in group]
    blocks = tensor.reshape([sizes[part] for part in parts])
    axes = [self.ours.index(part) for part in parts if '/' not in part]
    block = tuple(
      _block(part)[0] if '/' in part else slice(None) for part in parts
    )
    blocks[block] = array.transpose(axes)

  def _sizes(self, shape: Sequence[int]) -> Mapping[str, int]:
    sizes = dict(zip(self.ours, shape, strict=True))
    for group in self.theirs:
      sizes |= {part: int(part.split('/')[1]) for part in group if '/' in part}
    return sizes


def _block(part: str) -> tuple[int, int]:
  k = int(part.split('/')[0])
  return k, k + 1


_CHUNK_ROWS = 1024  # rows of two tensors that are compared at a time


class Name(NamedTuple):
  """The name and the layout of a tensor of a checkpoint.

  Attributes:
    template: The name of the tensor, with {layer} and {expert} in place of
      indices if each layer and expert has its own tensor.
    form: The layout in the checkpoint and here, such as 'F M -> M F'.
  """

  template: str
  form: str


# A table of tensor names. A key is the path of our variable in its collection,
# with 'layer' for the layer, such as 'decoder/layer/ffn/w_in'. Its value has
# alternative names of the variable's tensors: any of them is read, and an
# export writes the first.
Names = dict[str, tuple[Name, ...]]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One of our variables, and the tensors that it consists of.

  Attributes:
    path: The path of the variable, 'layers/layer_1/moe/experts/w_in', without
      its collection; no two collections have a path in common.
    shape: The shape of the variable.
    tensors: The name of each tensor, by the leading indices (of a layer and an
      expert) of the part of the variable that the tensor holds; () is all.
    form: The layout of each tensor.
  """

  path: str
  shape: tuple[int, ...]
  tensors: Mapping[tuple[int, ...], str]
  form: Form

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """The shape that each of the checkpoint's tensors must have."""
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
  """Every variable of a model with the names of its tensors.

  Args:
    names: The architecture's table.
    model: The model.
    variables: The model's variables by collection, or their shapes.
    tensors: The names of the checkpoint's tensors, which decide among
      alternative names.

  Raises:
    ValueError: The architecture lacks some of the variables; they are listed.
  """
  tensor_set, our_leaves, unknown_paths = set(tensors), [], []
  for keys, leaf in jax.tree_util.tree_leaves_with_path(variables):
    path = path_in_collection(keys)
    key, layers = path, (None,)
    layer_place = model.stacks.place_of(tuple(path.split('/')))
    if layer_place is not None:
      layers = layer_place.layers
      key = '/'.join((*layer_place.stack, 'layer', *layer_place.name))
    if key not in names:
      unknown_paths.append(path)
      continue
    alternatives = [
      Leaf(
        path, leaf.shape, _tensor_names(name, leaf.shape, layers),
        Form.parse(name.form),
      )
      for name in names[key]
    ]  # fmt: skip
    our_leaves.append(
      next(
        (s for s in alternatives if tensor_set & set(s.tensors.values())),
        alternatives[0],
      )
    )
  if unknown_paths:
    raise InputError(f'variables {unknown_paths} have no name there')
  return our_leaves


def path_in_collection(keys: tuple[Any, ...]) -> str:
  """A variable's path without its first key, the name of the collection."""
  return path_name(keys[1:])


def _tensor_names(name, shape, layers) -> dict[tuple[int, ...], str]:
  experts = (None,)
  if '{expert}' in name.template:
    experts = range(shape[0 if layers == (None,) else 1])
  names_by_index = {}
  for (row, layer), expert in itertools.product(enumerate(layers), experts):
    index = () if layer is None else (row,)
    index += () if expert is None else (expert,)
    names_by_index[index] = name.template.format(layer=layer, expert=expert)
  return names_by_index


def without_prefix(names: Names, prefix: str) -> Names:
  """The table with `prefix` removed from the names of tensors.

  A checkpoint that was saved without the head that gives logits has such names.
  """
  return {
    path: tuple(
      name._replace(template=name.template.removeprefix(prefix))
      for name in alternatives
    )
    for path, alternatives in names.items()
  }


def embedding_tables(prefix: str = '') -> Names:
  """The table entries of an encoder-decoder's embeddings and logits kernel.

  `prefix` begins the names of the embeddings' tensors; that of logits has none.
  """
  shared = Name(f'{prefix}shared.weight', 'V M')
  encoder = Name(f'{prefix}encoder.embed_tokens.weight', 'V M')
  decoder = Name(f'{prefix}decoder.embed_tokens.weight', 'V M')
  return {
    'embedding': (shared, encoder, decoder),
    'encoder_embedding': (encoder,),
    'w_logits': (Name('lm_head.weight', 'V M -> M V'),),
  }


def with_encoder_table(names: Names) -> Names:
  """The table of names for an encoder with an embedding of its own.

  Names of the shared tensor and of the encoder's are then no longer names of
  the decoder's embedding.
  """
  table = names['encoder_embedding'][0]
  _, *alternatives = names['embedding']
  return {
    **names,
    'embedding': tuple(name for name in alternatives if name != table),
  }


def has_encoder_table(names: Names, files: TensorFiles) -> bool:
  """Whether encoder and decoder of a checkpoint have different embeddings.

  The function is for embeddings that are not tied to logits: transformers then
  reads the encoder's and the decoder's table, and not the shared one.
  """
  tables = [name.template for name in names['embedding']]
  first, *rest = [name for name in tables if name in files.specs] or tables
  return any(not equal(files, first, table) for table in rest)


def copies(names: Names, our_leaves: Sequence[Leaf]) -> dict[str, str]:
  """Names of tensors that may repeat the embedding's tensor, which is read.

  A checkpoint may have the embedding by several names and, if the model has no
  logits kernel since logits are tied to the embedding, also as that kernel.

  Returns:
    The name of the embedding's tensor for each name of a copy.
  """
  leaf_by_path = {leaf.path: leaf for leaf in our_leaves}
  alternatives = list(names['embedding'])
  if 'w_logits' not in leaf_by_path:
    alternatives += names['w_logits']
  table_name = leaf_by_path['embedding'].tensors[()]
  return {
    name.template: table_name
    for name in alternatives
    if name.template != table_name
  }


def check(
  our_leaves: Sequence[Leaf],
  files: TensorFiles,
  copies: Mapping[str, str],
  unread_patterns: Sequence[str],
) -> list[str]:
  """A text for each reason why our variables cannot be read from a checkpoint.

  Args:
    our_leaves: Our variables.
    files: The files of the checkpoint.
    copies: For each tensor that may repeat another one, the tensor that it has
      to equal, as the function `copies` returns them.
    unread_patterns: Patterns of the names of tensors that need not be read.
  """
  problems, used_names = [], set()
  for leaf in our_leaves:
    shape = leaf.tensor_shape
    for name in leaf.tensors.values():
      used_names.add(name)
      spec = files.specs.get(name)
      if spec is None:
        problems.append(f'missing: {name} {list(shape)}, for {leaf.path}')
      elif spec.dtype not in FLOATS:
        problems.append(f'type: {name} is {spec.dtype}, none of {list(FLOATS)}')
      elif spec.shape != shape:
        problems.append(
          f'shape: {name} is {list(spec.shape)}, the config asks for '
          f'{list(shape)}'
        )
  for name in files.specs.keys() - used_names:
    if name in copies and copies[name] in files.specs:
      if not equal(files, name, copies[name]):
        problems.append(f'tied: {name} differs from {copies[name]}')
    elif not any(re.search(pattern, name) for pattern in unread_patterns):
      problems.append(f'unknown: {name} {list(files.specs[name].shape)}')
  return sorted(problems)


def equal(files: TensorFiles, a: str, b: str) -> bool:
  """Whether two tensors of the files are equal; reads a few rows at a time."""
  if files.specs[a].shape != files.specs[b].shape:
    return False
  rows, *rest = files.specs[a].shape
  for start in range(0, rows, _CHUNK_ROWS):
    index = (
      slice(start, min(start + _CHUNK_ROWS, rows)),
      *(slice(0, size) for size in rest),
    )
    if not np.array_equal(files.read(a, index), files.read(b, index)):
      return False
  return True
