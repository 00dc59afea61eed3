"""From a `DataConfig` to rows: source, tokenizer, token cache, task.

Not here: batches (`pipeline.py`).
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from moe_jax.config import unknown
from moe_jax.data import store, tokenizers
from moe_jax.data.layouts import DecoderLayout, EncoderDecoderLayout, Layout
from moe_jax.data.packing import PackedRows, Rows
from moe_jax.data.sources import classes
from moe_jax.data.sources import pairs as pair_sources
from moe_jax.data.sources import texts as text_sources
from moe_jax.data.sources.texts import SPLITS
from moe_jax.data.tasks import class_rows, ul2
from moe_jax.data.tasks.denoising import DenoisedRows, WindowTask
from moe_jax.data.tasks.prefix_lm import PrefixLM
from moe_jax.data.tasks.seq2seq import PairRows
from moe_jax.data.tasks.span_corruption import SpanCorruption
from moe_jax.data.tokenizers.extra_ids import Extended, extend, mode_name

TASKS = ('lm', 'prefix_lm', 'span_corruption', 'ul2', 'seq2seq', 'classes')
_WITH_SENTINELS = ('span_corruption', 'ul2')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What text, as which tokens, in rows of which length, to learn what.

  Attributes:
    source: 'python_stdlib', 'python_stdlib:<module>,<module>',
      'files:<glob>', 'tfds:<name>' or, synthetic, 'cipher:<K>' and
      'cipher:<K>,marked'; see `sources.texts.open_source`. Of the task
      'seq2seq': 'python_stdlib_docstrings', 'django_gettext:<languages>',
      'tfds:<name>' or, synthetic, 'kv_recall:<N>'; see
      `sources.pairs.open_pairs`. Of the task 'classes': see
      `sources.classes.open_classes`.
    tokenizer: 'bytes', 'chars' or 'json:<path>' (a tokenizers JSON file). Not
      of the task 'classes', whose vocabulary are their names.
    seq_len: T; of an encoder-decoder model T_enc; 1 of the task 'classes'.
    text_feature: The TFDS feature that holds the text.
    train_split: The source's split to train on. TFDS sources, python_stdlib
      and its docstrings among them, take any split expression, such as
      'train[:90%]'.
    validation_split: The source's split to validate on.
    cache_dir: Where token streams and the embedded corpus are kept; '' is
      $MOE_JAX_CACHE or ~/.cache/moe_jax. TFDS datasets stay where TFDS has
      them ($TFDS_DATA_DIR).
    task: 'lm', 'prefix_lm', 'span_corruption' (T5), 'ul2', 'seq2seq' or, of
      examples that are no text, 'classes'.
    target_len: T_dec. 0 is for a decoder-only model: the inputs of a task
      other than 'lm' stand before its targets in rows of `seq_len`.
    noise_density: Of 'span_corruption', the share that is cut out.
    mean_noise_span: Of 'span_corruption', in tokens.
    num_sentinels: Of 'span_corruption' and 'ul2'; those that the tokenizer
      lacks come after its last id.
    final_sentinel: Whether the targets of cut-out spans end in a sentinel of
      their own; see `SpanCorruption`.
    denoisers: Of 'ul2': (mode, mean span, density, weight) of each; see
      `ul2.Denoiser`.
    input_feature: Of 'seq2seq', the TFDS feature with the inputs, such as
      'document' or 'translation/de'.
    target_feature: Of 'seq2seq', the one with the targets.
    input_prefix: Of 'seq2seq', stands before all inputs: 'summarize: '.
    pack: Whether short examples of a task other than 'lm' share a row.
  """

  source: str
  tokenizer: str
  seq_len: int
  text_feature: str = 'text'
  train_split: str = 'train'
  validation_split: str = 'validation'
  cache_dir: str = ''
  task: str = 'lm'
  target_len: int = 0
  noise_density: float = 0.15
  mean_noise_span: float = 3.0
  num_sentinels: int = 100
  final_sentinel: bool = True
  denoisers: Sequence[Sequence[Any]] = ul2.DENOISERS
  input_feature: str = 'inputs'
  target_feature: str = 'targets'
  input_prefix: str = ''
  pack: bool = True

  @property
  def encoder_decoder(self) -> bool:
    """Whether the batches have an encoder's side."""
    return self.task != 'lm' and self.target_len > 0


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A tokenized corpus and what is to be learned from it.

  Attributes:
    source: What it is, for people.
    tokenizer: As fitted when the corpus was tokenized, with the ids that the
      task adds.
    splits: The rows of 'train' and of 'validation'.
    digest: The sha256 of both splits' texts, in order; results are comparable
      only where it is the same.
    counts: For each split its 'documents', 'bytes' (of UTF-8) and 'tokens'; of
      pairs 'pairs', 'bytes', 'input_tokens', 'target_tokens' (before any EOS)
      and 'truncated', the pairs that are too long for a row; of classes
      'examples'.
    task: Of `TASKS`.
  """

  source: str
  tokenizer: tokenizers.Tokenizer
  splits: dict[str, Rows]
  digest: str
  counts: dict[str, dict[str, int]]
  task: str = 'lm'

  @property
  def vocab_size(self) -> int:
    """V of a model of this data: ids are below it."""
    return self.tokenizer.vocab_size

  @property
  def feature_shape(self) -> tuple[int, ...]:
    """Of one example of the task 'classes'; () of tokens."""
    return self.tokenizer.feature_shape

  @property
  def counted(self) -> str:
    """What losses and speed are of."""
    return 'example' if self.task == 'classes' else 'token'

  @property
  def loss_unit(self) -> str:
    """That of a loss; of examples it is the model's own error, often nats."""
    return 'nats/token' if self.counted == 'token' else f'per {self.counted}'

  def describe(self) -> str:
    """Lines to print at the start of a run: what is trained on, exactly."""
    counted = [
      f'{sum(counts[key] for counts in self.counts.values()):,} {key}'
      for key in ('documents', 'pairs', 'examples', 'bytes')
      if key in self.counts['train']
    ]
    lines = [
      f'data: {self.source}, {", ".join(counted)}, sha256 {self.digest}',
      f'tokenizer: {self.tokenizer.identity}, V={self.vocab_size}',
    ]
    if self.task != 'lm':
      lines.insert(1, f'task: {self.task}')
    for split, rows in self.splits.items():
      counts = ', '.join(
        f'{count:,} {name.replace("_", " ")}'
        for name, count in self.counts[split].items()
      )
      lines.append(f'{split}: {counts}, {rows.describe()}')
    return '\n'.join(lines)


def load(config: DataConfig) -> Dataset:
  """The dataset of `config`, tokenized now unless it is in the cache.

  Tokens are memory-mapped. The cache is keyed by the source's content and the
  tokenizer; it holds whole streams, so lengths and tasks on the same texts may
  change freely.

  Raises:
    ValueError: A length is out of range; the task, the source or the tokenizer
      is unknown or missing; a text has a character the tokenizer lacks; a split
      is empty; a row is too short for the task, or the sentinels too few.
  """
  if config.seq_len < 1:
    raise ValueError(f'seq_len={config.seq_len} is not at least 1')
  for name in ('target_len', 'num_sentinels'):
    if getattr(config, name) < 0:
      raise ValueError(f'{name}={getattr(config, name)} is negative')
  if config.task not in TASKS:
    raise unknown('task', config.task, TASKS)
  if config.task == 'classes':
    return _classes(config)
  identity = tokenizers.spec_identity(config.tokenizer)
  source = _open(config)
  key = f'{store.FORMAT} {source.identity} {identity}'
  name = hashlib.sha256(key.encode()).hexdigest()[:32]
  folder = store.prepared(
    store.cache_root(config.cache_dir) / 'tokens' / name,
    lambda folder: _tokenize(folder, source, config.tokenizer),
  )
  about = store.read_about(folder)
  tokenizer = tokenizers.load(folder / 'tokenizer.json')
  if config.task != 'lm':
    tokenizer = _extended(config, tokenizer)
  splits = {split: _rows(config, tokenizer, folder, split) for split in SPLITS}
  counts = {split: dict(about['splits'][split]) for split in SPLITS}
  for split, rows in splits.items():
    if isinstance(rows, PairRows):
      counts[split]['truncated'] = rows.truncated
  return Dataset(
    source=source.name,
    tokenizer=tokenizer,
    splits=splits,
    digest=about['sha256'],
    counts=counts,
    task=config.task,
  )


def _classes(config: DataConfig) -> Dataset:
  if config.seq_len != 1 or config.target_len:
    raise ValueError(
      f"task='classes' has examples, not tokens: seq_len={config.seq_len} must "
      f'be 1, target_len={config.target_len} be 0'
    )
  source = classes.open_classes(config.source)
  splits = {split: class_rows.ClassRows(source, split) for split in SPLITS}
  shape = splits['train'].feature_shape
  return Dataset(
    source=source.name,
    tokenizer=tokenizers.ClassNames(source.classes, shape),
    splits=splits,
    digest=class_rows.digest_of(splits),
    counts={split: {'examples': len(rows)} for split, rows in splits.items()},
    task=config.task,
  )


def read_pairs(config: DataConfig, split: str) -> Iterator[pair_sources.Pair]:
  """The texts that the rows of a split of 'seq2seq' are made of, in order.

  Raises:
    ValueError: The task is another, or as `load`.
  """
  if config.task != 'seq2seq':
    raise ValueError(f"task={config.task!r} has no pairs; 'seq2seq' has")
  pairs = _open(config).pairs(split)
  return ((inputs, target) for inputs, target in pairs if inputs and target)


def _open(config: DataConfig) -> text_sources.Source | pair_sources.PairSource:
  splits = config.train_split, config.validation_split
  if config.task == 'seq2seq':
    selection = pair_sources.PairSelection(
      splits, config.input_feature, config.target_feature, config.input_prefix
    )
    return pair_sources.open_pairs(config.source, selection, config.cache_dir)
  kind = config.source.partition(':')[0]
  if kind in ('python_stdlib_docstrings', 'django_gettext', 'kv_recall'):
    raise ValueError(
      f"source {config.source!r} has pairs: task='seq2seq' reads them, "
      f'task={config.task!r} reads texts'
    )
  selection = text_sources.Selection(splits, config.text_feature)
  return text_sources.open_source(config.source, selection, config.cache_dir)


def _tokenize(
  folder: pathlib.Path,
  source: text_sources.Source | pair_sources.PairSource,
  spec: str,
) -> None:
  if isinstance(source, pair_sources.PairSource):
    stream, write = source.pairs, store.write_pairs
  else:
    stream, write = source.documents, store.write_tokens

  def texts() -> Iterator[str]:
    for split in SPLITS:
      for item in stream(split):
        yield from (item,) if isinstance(item, str) else item

  tokenizer = tokenizers.fit(spec, texts())
  write(folder, {split: stream(split) for split in SPLITS}, tokenizer)


def _extended(config: DataConfig, base: tokenizers.Tokenizer) -> Extended:
  spans = config.task in _WITH_SENTINELS
  return extend(
    base,
    num_sentinels=config.num_sentinels if spans else 0,
    modes=ul2.MODES if config.task == 'ul2' else (),
    end_inputs=(
      config.encoder_decoder or config.task in ('span_corruption', 'seq2seq')
    ),
  )


def _rows(
  config: DataConfig,
  tokenizer: tokenizers.Tokenizer,
  folder: pathlib.Path,
  split: str,
) -> Rows:
  if config.task == 'lm':
    return PackedRows(*store.read_tokens(folder, split), config.seq_len)
  layout = DecoderLayout(config.seq_len)
  if config.encoder_decoder:
    layout = EncoderDecoderLayout(
      config.seq_len, config.target_len, tokenizer.start_id
    )
  if config.task == 'seq2seq':
    inputs, targets = store.read_pairs(folder, split)
    return PairRows(inputs, targets, layout, tokenizer.eos_id, pack=config.pack)
  task = _window_task(config, tokenizer, layout)
  stream = store.read_tokens(folder, split)
  return DenoisedRows(*stream, task, pack=config.pack)


def _window_task(
  config: DataConfig, tokenizer: Extended, layout: Layout
) -> WindowTask:
  sentinels = tokenizer.sentinel_ids[: config.num_sentinels]
  eos_id = tokenizer.eos_id
  if config.task == 'prefix_lm':
    ends = eos_id if config.encoder_decoder else None
    return PrefixLM(layout, eos_id=ends)
  if config.task == 'span_corruption':
    return SpanCorruption(
      layout,
      sentinels,
      eos_id,
      config.noise_density,
      config.mean_noise_span,
      config.final_sentinel,
    )
  return ul2.mixture(
    config.denoisers,
    layout,
    sentinels=sentinels,
    eos_id=eos_id,
    mode_ids={m: tokenizer.token_id(mode_name(m)) for m in ul2.MODES},
    final_sentinel=config.final_sentinel,
    end_prefix=config.encoder_decoder,
  )
