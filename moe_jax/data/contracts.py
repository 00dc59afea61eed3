"""The contracts of data: what a tokenizer, a source and a task are.

    source      texts, or pairs of texts, in two splits: `SourceOptions` opens
                `Texts` or `Pairs`
    tokenizer   text to ids, and back: `TokenizerOptions` fits a `Tokenizer`
    task        rows of tokens of a stream: `TaskOptions` makes the `Rows` of a
                `Dataset`

A mixture, `mixtures.MixtureOptions`, has several sources, one tokenizer and one
task.
"""

import abc
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from moe_jax.config import Options, required, unknown
from moe_jax.data import urls
from moe_jax.data.layouts import RowShape
from moe_jax.data.packing import Rows
from moe_jax.data.plain_files import parse_json, read_text
from moe_jax.devices import cache_root
from moe_jax.errors import InputError

SPLITS: tuple[str, str] = ('train', 'validation')
DOCUMENTS, PAIRS = ('documents',), ('inputs', 'targets')  # names of streams
Pair = tuple[str, str]
Token = int | np.integer
Ids = Collection  # of integers: a list, a tuple, an array [N]

# Errors that a state which `save` did not write may raise in `from_state`.
_DAMAGED = AttributeError, LookupError, RecursionError, TypeError, ValueError
# Tokenizer classes by their names in files. A class is added when its module is
# imported. A file that names a class imports nothing, so it runs no code.
_SAVED: dict[str, type['Tokenizer']] = {}


class Tokenizer(abc.ABC):
  """A fixed mapping between text and ids in [0, vocab_size).

  Attributes:
    kind: Name of the class in files; a user's class has the name 'module:name'.
    vocab_size: V, one more than the largest id.
    eos_id: Id that ends a document; None if there is none.
    bos_id: Id that begins a document; None if there is none.
    pad_id: Id of padding; None if there is none.
    forced_bos_id: Id that generation always emits first, such as a target
      language; None if there is none.
    sentinel_ids: Ids that stand for masked spans, in order; empty if the
      vocabulary has none.
    identity: Text that is equal for two tokenizers exactly if they encode all
      texts equally.
  """

  kind: ClassVar[str]
  vocab_size: int
  eos_id: int | None = None
  bos_id: int | None = None
  pad_id: int | None = None
  forced_bos_id: int | None = None
  sentinel_ids: tuple[int, ...] = ()
  identity: str

  def __init_subclass__(cls, kind: str = '', **more: Any):
    super().__init_subclass__(**more)
    cls.kind = kind or f'{cls.__module__}:{cls.__qualname__}'
    _SAVED[cls.kind] = cls
    # A class that changes how a text is encoded changes it for batches, too.
    if 'encode' in vars(cls) and 'encode_batch' not in vars(cls):
      cls.encode_batch = Tokenizer.encode_batch

  # A subclass may set these attributes itself, in place of the properties.

  @functools.cached_property
  def start_id(self) -> int | None:
    """The first id of a decoder's input, by default the EOS; it may be None."""
    return self.eos_id

  @functools.cached_property
  def eos_ids(self) -> tuple[int, ...]:
    """All ids that end generation, `eos_id` first; empty if there is none."""
    return () if self.eos_id is None else (self.eos_id,)

  @functools.cached_property
  def ids_identity(self) -> str:
    """Text that is equal for two tokenizers exactly if their ids mean the same.

    Two such tokenizers may differ in whether inputs end in an EOS, which a task
    decides.
    """
    return self.identity

  @functools.cached_property
  def label(self) -> str:
    """Text about the tokenizer that a run prints at its start."""
    return self.identity

  @abc.abstractmethod
  def encode(self, text: str) -> np.ndarray:
    """The ids of a document's text, int32 [N], without an EOS."""

  def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
    """The ids of each document's text, integers [N], without an EOS."""
    return [self.encode(text) for text in texts]

  def encode_inputs(self, text: str, *, added: bool = True) -> np.ndarray:
    """The ids of a model's input, int32 [N].

    Unlike the ids of a document, these ids include special tokens that the
    tokenizer adds, and special tokens that the text spells. `added=False` is
    for a part of an input, to which nothing is added. By default, the ids are
    those of `encode`.
    """
    del added
    return self.encode(text)

  @abc.abstractmethod
  def decode(self, ids: Ids) -> str:
    """The text of `ids`; an EOS has no text.

    Raises:
      ValueError: An id is outside [0, vocab_size).
    """

  @abc.abstractmethod
  def token_name(self, token: Token) -> str:
    r"""A short printable name of a token: `'e'`, `'\n'`, `0x80`, `<eos>`."""

  @abc.abstractmethod
  def state(self) -> dict[str, Any]:
    """A JSON object from which `from_state` makes an equal tokenizer."""

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> 'Tokenizer':
    """A tokenizer equal to the one whose method `state` returned `state`.

    By default the class is called with the entries of `state` as arguments.
    """
    return cls(**state)

  def to_json(self) -> dict[str, Any]:
    """The tokenizer's state with the name of its class, for `from_json`."""
    return {'kind': self.kind, **self.state()}

  def save(self, path: str | os.PathLike) -> None:
    """Writes the tokenizer as JSON, which `load` reads.

    The file is replaced at once, so that it is never half written.
    """
    text = json.dumps(self.to_json(), indent=1)
    path = pathlib.Path(path)
    unfinished = path.with_name(f'{path.name}.tmp')
    unfinished.write_text(text + '\n', encoding='utf-8')
    unfinished.replace(path)

  def __reduce__(self):
    """Pickles the state alone, from which an equal tokenizer is made."""
    return type(self).from_state, (self.state(),)

  def _in_vocabulary(self, ids: Ids) -> np.ndarray:
    ids = np.asarray(ids, np.int64).reshape(-1)
    wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
    if wrong.size:
      raise InputError(
        f'token {wrong[0]} not in [0, vocab_size={self.vocab_size})'
      )
    return ids


class TokenizerOptions(Options):
  """Contract of options from which a tokenizer is read, or fitted to texts."""

  @required
  def identity(self) -> str:
    """Text that tells options apart by the tokenizers that they make.

    It is equal exactly for options whose `fit` makes equal tokenizers from
    equal texts.

    Raises:
      ValueError: A file of the tokenizer is missing or bad.
    """

  @required
  def fit(self, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of these options, fitted to the texts if it depends on any.

    Args:
      texts: All texts of the data, for a tokenizer that depends on them.

    Raises:
      ValueError: A file of the tokenizer is missing or bad, or the texts are
        too few.
    """

  def known_vocab_size(self) -> int | None:
    """V, the size of the vocabulary; None if it depends on the texts."""
    return None


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `Tokenizer.save` wrote to `path`.

  Raises:
    ValueError: The file was not written by `save`, or names a class of a
      module that has not been imported.
  """
  saved = parse_json(read_text(pathlib.Path(path)), path)
  try:
    return from_json(saved)
  except _DAMAGED as error:
    reason = error if isinstance(error, InputError) else f'{error!r:.200}'
    raise InputError(f'{path} holds no saved tokenizer: {reason}') from None


def from_json(saved: Mapping[str, Any]) -> Tokenizer:
  """A tokenizer equal to the one whose method `to_json` returned `saved`.

  Raises:
    ValueError: No class that has been imported has the name `saved['kind']`.
  """
  state = dict(saved)
  kind = state.pop('kind')
  if not isinstance(kind, str) or kind not in _SAVED:
    raise unknown('tokenizer kind', kind, _SAVED)
  return _SAVED[kind].from_state(state)


def digest(text: str) -> str:
  """16 hexadecimal digits of the text's sha256."""
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Selection:
  """The splits of a source that are read, and the folder of prepared data.

  Attributes:
    splits: The source's own names of the splits that are taken for 'train' and
      'validation'. TFDS sources, as well as python_stdlib and its docstrings,
      take any split expression, such as 'train[90%:]'.
    cache_dir: Folder of prepared data; '' stands for $MOE_JAX_CACHE or
      ~/.cache/moe_jax. If `cache_dir` is a URL, data that lies there is first
      copied to a folder within that default folder.
    cache_digests: Whether large files of prepared data are read through before
      use, to check their digests.
  """

  splits: tuple[str, str] = SPLITS
  cache_dir: str = ''
  cache_digests: bool = True

  def name_of(self, split: str) -> str:
    """The source's own name of the split 'train' or 'validation'."""
    return self.splits[SPLITS.index(split)]

  @property
  def cache(self) -> pathlib.Path:
    """The folder of this machine that has prepared data.

    Where `cache_dir` is a URL, the folder belongs to this URL alone, so that
    all that the folder has is at the URL, too.
    """
    if not (url := self.url()):
      return cache_root(self.cache_dir)
    return cache_root() / 'urls' / hashlib.sha256(url.encode()).hexdigest()[:16]

  def url(self, *names: str) -> str:
    """The URL of a folder in `cache_dir`; '' if `cache_dir` is no URL.

    `names` lead to the folder; without names it is `cache_dir` itself.
    """
    is_url = urls.is_url(self.cache_dir)
    return '/'.join([self.cache_dir.rstrip('/'), *names]) if is_url else ''

  def check_splits(self, source: str) -> None:
    """Raises ValueError unless both splits are 'train' or 'validation'.

    The message names the kind `source`, whose splits have no other names.
    """
    for split in self.splits:
      if split not in SPLITS:
        raise unknown(f'split of {source}', split, SPLITS)


class Pieces:
  """The documents or pairs of a source in pieces, by default in one piece.

  A process tokenizes a piece at a time. A subclass that is to have several
  pieces overrides `sizes` and `read`, and must be possible to pickle.

  Attributes:
    sizes: Number of bytes of each piece in its files; 0 if it is not known.
  """

  sizes: tuple[int, ...] = (0,)

  def __init__(self, entries: Callable[[str], Iterator[tuple[str, ...]]]):
    """Takes a function that gives the documents or the pairs of a split.

    Of 'train' or 'validation' it yields documents, each as (text,), or pairs.
    """
    self._entries = entries

  def read(self, number: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The documents or pairs of piece `number`, each as (split, its texts).

    Every call gives the same texts in the same order. Where there is a single
    piece, all texts of 'train' come before those of 'validation'.
    """
    del number
    return (
      (split, entry) for split in SPLITS for entry in self._entries(split)
    )


@dataclasses.dataclass(frozen=True)
class Texts:
  """Documents in two splits.

  Attributes:
    name: Description of the source for messages.
    identity: Text that is equal only for equal documents in equal order (of a
      TFDS dataset, only if description, paths and times of files are equal).
    texts: Function from 'train' or 'validation' to an iterator over the texts,
      which begins anew at each call and has the same order.
    pieces: The same documents in pieces, for several processes; None where one
      process tokenizes them all.
  """

  streams: ClassVar[tuple[str, ...]] = DOCUMENTS

  name: str
  identity: str
  texts: Callable[[str], Iterator[str]]
  pieces: Pieces | None = None

  def in_pieces(self) -> Pieces:
    """The documents in pieces; in a single one if `pieces` is None."""
    return self.pieces or Pieces(
      lambda split: ((text,) for text in self.texts(split))
    )


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Pairs of inputs and targets in two splits.

  Attributes:
    name: Description of the source for messages.
    identity: Text that is equal only for equal pairs in equal order (of a TFDS
      dataset, only if description, paths and times of files are equal).
    pairs: Function from 'train' or 'validation' to an iterator over (inputs,
      targets), which begins anew at each call and has the same order.
  """

  streams: ClassVar[tuple[str, ...]] = PAIRS

  name: str
  identity: str
  pairs: Callable[[str], Iterator[Pair]]

  def texts(self, split: str) -> Iterator[str]:
    """Every text of a split, for tokenizers that are fitted to them."""
    return (text for pair in self.pairs(split) for text in pair)

  def in_pieces(self) -> Pieces:
    """The pairs as a single piece, which one process tokenizes as a whole."""
    return Pieces(self.pairs)

  def with_prefix(self, prefix: str) -> 'Pairs':
    """These pairs with `prefix` before all inputs."""
    if not prefix:
      return self
    return dataclasses.replace(
      self,
      identity=f'{self.identity} prefix {prefix!r}',
      pairs=lambda split: ((prefix + i, t) for i, t in self.pairs(split)),
    )


class Question(NamedTuple):
  """A validation example, and how an answer to it is judged.

  Attributes:
    inputs: Text that a model is given.
    target: The right answer.
    choices: All answers to choose from; empty where an answer is any text.
    metric: Name of the score of `moe_jax.evaluation.scores` by which an answer
      that may be any text is judged.
  """

  inputs: str
  target: str
  choices: tuple[str, ...] = ()
  metric: str = 'exact_match'


class SourceOptions(Options):
  """Contract of a source, whose options open its texts, its pairs, or both.

  A source overrides the method `texts`, `pairs`, or both. A caller that asks
  for the other form of data gets a ValueError.

  Attributes:
    only_in: 'texts' or 'pairs', by the name of each option that has an effect
      only where texts or only where pairs are read. All other options always
      have an effect.
    is_embedded: Whether the source needs no file. In the small run that the
      argument ':runlocal' makes of a config, such a source stays in a mixture,
      and all other sources are replaced.
    metric: Name of the score of `moe_jax.evaluation.scores` by which answers to
      the source's pairs are judged, unless it has `questions` of its own.
  """

  is_embedded: ClassVar[bool] = False
  only_in: ClassVar[Mapping[str, str]] = {}
  metric: ClassVar[str] = 'exact_match'

  def texts(self, selection: Selection = Selection()) -> Texts:
    """The documents of the source, in two splits.

    Raises:
      ValueError: The source has no texts, or its data is missing or bad.
    """
    del selection
    raise InputError(f'{type(self).__name__} gives no texts')

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """The pairs of inputs and targets of the source, in two splits.

    Raises:
      ValueError: The source has no pairs, or its data is missing or bad.
    """
    del selection
    raise InputError(f'{type(self).__name__} gives no pairs')

  @property
  def cluster(self) -> str:
    """Name of the source's cluster, a group of similar sources; '' for none."""
    return ''

  def questions(self, selection: Selection = Selection()) -> list[Question]:
    """The validation pairs as questions; a pair with an empty side has none."""
    pairs = self.pairs(selection).pairs('validation')
    return [Question(*pair, metric=self.metric) for pair in pairs if all(pair)]

  @classmethod
  def gives(cls) -> tuple[str, ...]:
    """The forms of data that the source gives: 'texts', 'pairs', or both."""
    given = {
      'texts': cls.texts is not SourceOptions.texts,
      'pairs': cls.pairs is not SourceOptions.pairs,
    }
    return tuple(form for form in given if given[form])


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A corpus in rows of tokens, and the task that is learned from it.

  Attributes:
    source: Description of the source for messages.
    tokenizer: Tokenizer as fitted when the corpus was tokenized, with the ids
      that the task adds.
    splits: Rows of 'train' and of 'validation'.
    digest: The sha256 of both splits' texts, in order, or of the pieces' sha256
      where texts were tokenized in pieces; results are comparable only if the
      digests are equal.
    counts: Numbers by name for each split. Texts have 'documents', 'bytes' (of
      UTF-8) and 'tokens'; pairs have 'pairs', 'bytes', 'input_tokens',
      'target_tokens' (without EOS) and 'truncated', the number of pairs that
      are too long for a row.
    task: Options of the task.
    parts: The dataset of each source of a mixture by name, also of sources that
      are only evaluated; empty for a single source.
  """

  source: str
  tokenizer: Tokenizer
  splits: dict[str, Rows]
  digest: str
  counts: dict[str, dict[str, int]]
  task: 'TaskOptions'
  parts: Mapping[str, 'Dataset'] = dataclasses.field(default_factory=dict)

  @property
  def vocab_size(self) -> int:
    """V, the number of ids that a model of this data needs."""
    return self.tokenizer.vocab_size

  def describe(self) -> str:
    """Lines on the data, to be printed at the start of a run."""
    counted = [
      f'{sum(counts[key] for counts in self.counts.values()):,} {key}'
      for key in ('documents', 'pairs', 'bytes')
      if key in self.counts['train']
    ]
    lines = [f'data: {self.source}, {", ".join(counted)}, sha256 {self.digest}']
    if self.task.label:
      lines.append(f'task: {self.task.label}')
    lines.append(f'tokenizer: {self.tokenizer.label}, V={self.vocab_size}')
    for split, rows in self.splits.items():
      counts = ', '.join(
        f'{count:,} {name.replace("_", " ")}'
        for name, count in self.counts[split].items()
      )
      lines.append(f'{split}: {counts}, {rows.describe()}')
    return '\n'.join(lines)

  def tell(self, row: Mapping[str, float]) -> str:
    """The metrics of an evaluation as text, printed after its name.

    Args:
      row: The metrics by name.
    """
    return ', '.join(f'{name} {value:.4g}' for name, value in row.items())


class TaskOptions(Options):
  """Contract of a task: the rows that it cuts from streams of tokens.

  The cache keeps streams of tokens, which depend on source and tokenizer alone,
  so that other tasks and rows of other lengths use the same streams. Code that
  is not a task depends on the attributes below, never on a task's name.

  Attributes:
    reads: What the task reads of a source: 'texts', tokenized to one stream, or
      'pairs', tokenized to a stream of inputs and a stream of targets.
    label: Name of the task that a run prints; '' (of a language model) prints
      none.
    makes_examples: Whether a row has examples, each of inputs and targets. Only
      such rows can have an encoder's side or hold several short examples.
    generates: Whether text that a model generates from the inputs can be
      compared with the targets.
    answers_go_on: Whether targets directly continue the text of the inputs in a
      decoder-only model, without a token in between.
    input_prefix: Text that the task puts before all inputs.
    keep_end: Whether inputs that are too long lose their beginning, not their
      end.
  """

  reads: ClassVar[str] = 'texts'
  label: ClassVar[str]
  makes_examples: ClassVar[bool] = True
  generates: ClassVar[bool] = False
  answers_go_on: ClassVar[bool] = False
  input_prefix: ClassVar[str] = ''
  keep_end: ClassVar[bool] = False

  def open(self, source: SourceOptions, selection: Selection) -> Texts | Pairs:
    """The source's texts, or its pairs; `input_prefix` is put before inputs."""
    if self.reads == 'texts':
      return source.texts(selection)
    return source.pairs(selection).with_prefix(self.input_prefix)

  def vocabulary(self, base: Tokenizer, shape: RowShape) -> Tokenizer:
    """`base` with the ids that the task adds; by default a task adds none."""
    del shape
    return base

  @required
  def rows(self, stream: Any, tokenizer: Tokenizer, shape: RowShape) -> Rows:
    """The rows of one split.

    Args:
      stream: Tokens of the split, and where each text begins; for pairs the
        streams of inputs and of targets (see `store.read`).
      tokenizer: Tokenizer from `vocabulary`.
      shape: Lengths of the rows.

    Raises:
      ValueError: A row is too short for the task.
    """
