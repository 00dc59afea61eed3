"""Batches from texts: sources, tokenizers, tasks, rows, the stream of batches.

`batch(i)` is a pure function of i, so the state of a run's data is one
integer.
"""

# `import X as X` marks the name X as public.
from moe_jax.data.choices import CHOICE_SOURCES as CHOICE_SOURCES
from moe_jax.data.choices import SHOTS_SOURCES as SHOTS_SOURCES
from moe_jax.data.choices import ChoiceFilesSource as ChoiceFilesSource
from moe_jax.data.choices import Item as Item
from moe_jax.data.contracts import SPLITS as SPLITS
from moe_jax.data.contracts import Dataset as Dataset
from moe_jax.data.contracts import Pairs as Pairs
from moe_jax.data.contracts import Question as Question
from moe_jax.data.contracts import Selection as Selection
from moe_jax.data.contracts import SourceOptions as SourceOptions
from moe_jax.data.contracts import TaskOptions as TaskOptions
from moe_jax.data.contracts import Texts as Texts
from moe_jax.data.dataset import DataOptions as DataOptions
from moe_jax.data.dataset import load as load
from moe_jax.data.dataset import read_pairs as read_pairs
from moe_jax.data.mixtures import MixtureOptions as MixtureOptions
from moe_jax.data.packing import PackedRows as PackedRows
from moe_jax.data.packing import Rows as Rows
from moe_jax.data.pipeline import DataError as DataError
from moe_jax.data.pipeline import batch_dataset as batch_dataset
from moe_jax.data.pipeline import eval_batches as eval_batches
from moe_jax.data.pipeline import spread as spread
from moe_jax.data.pipeline import train_batches as train_batches
from moe_jax.data.sources import SOURCES as SOURCES
from moe_jax.data.sources import DocstringsSource as DocstringsSource
from moe_jax.data.sources import FilesSource as FilesSource
from moe_jax.data.sources import GettextSource as GettextSource
from moe_jax.data.sources import InstructionSource as InstructionSource
from moe_jax.data.sources import JsonlSource as JsonlSource
from moe_jax.data.sources import PythonStdlibSource as PythonStdlibSource
from moe_jax.data.sources import TfdsSource as TfdsSource
from moe_jax.data.sources import instructions as instructions
from moe_jax.data.tasks import TASKS as TASKS
from moe_jax.data.tasks.seq2seq import Seq2SeqTask as Seq2SeqTask
from moe_jax.data.tasks.texts import LmTask as LmTask
from moe_jax.data.tasks.texts import PrefixLmTask as PrefixLmTask
from moe_jax.data.tasks.texts import SpanCorruptionTask as SpanCorruptionTask
from moe_jax.data.tasks.texts import Ul2Task as Ul2Task
from moe_jax.data.tokenizers import TOKENIZERS as TOKENIZERS
from moe_jax.data.tokenizers import BytesOptions as BytesOptions
from moe_jax.data.tokenizers import CharsOptions as CharsOptions
from moe_jax.data.tokenizers import FileOptions as FileOptions
from moe_jax.data.tokenizers import JsonOptions as JsonOptions
from moe_jax.data.tokenizers import TokenizerOptions as TokenizerOptions
from moe_jax.data.tokenizers import TrainedOptions as TrainedOptions
