"""Folders of checkpoints with tokenizers, configs of runs, and bad pickles."""

import json
import pathlib

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from moe_jax import cli, run_config
from moe_jax.config import merge
from moe_jax.interop import import_run as import_run_lib
from moe_jax.interop.checkpoint_folder import open_checkpoint
from tests.interop import oracle

CHAT = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
# The vocabulary is these special tokens, then all bytes, so that any text can
# be trained on.
_SPECIAL = ('<pad>', '</s>', '<s>', *(f'<extra_id_{i}>' for i in range(4)))
_ROLES = {
  'deepseek_v3': dict(bos='<s>', eos='</s>'),
  'mixtral': dict(bos='<s>', eos='</s>'),
  'nllb-moe': dict(bos='<s>', eos='</s>', pad='<pad>'),
  'switch_transformers': dict(eos='</s>', pad='<pad>'),
}
_DECODERS = 'deepseek_v3', 'mixtral'
VOCAB_SIZE = 264  # one more than there are tokens
# This config has what a checkpoint does not give: a short text and two steps.
CONFIG = """
from moe_jax.configs import base

def get_config():
  c = base.get_config()
  c.total_steps = 2
  c.batch_size = 2
  c.log_every_steps = 1
  c.data.source.python_stdlib.modules = 'email,json'
  c.data.seq_len = 48
  c.mesh.data = 1
  c.checkpoint.every_steps = 0
  c.checkpoint.best_eval = 'all'
  c.evals = {'all': base.evaluation(num_batches=1)}
  c.optimizer.schedule.warmup_steps = 1
  c.sample.num_tokens = 0
  return base.finish(c)
"""


def write_tokenizer(folder, kind):
  """Writes transformers' files of a tokenizer: its JSON, roles and template."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {name: i for i, name in enumerate([*_SPECIAL, *alphabet])}
  tokenizer = Tokenizer(models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(list(_SPECIAL))
  if kind not in _DECODERS:
    tokenizer.post_processor = processors.TemplateProcessing(
      single='$A </s>', special_tokens=[('</s>', vocabulary['</s>'])]
    )
  tokenizer.save(str(folder / 'tokenizer.json'))
  roles = {f'{role}_token': name for role, name in _ROLES[kind].items()}
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', **roles}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  (folder / 'chat_template.jinja').write_text(CHAT)


def write(folder, kind, **options):
  """Writes a checkpoint with its tokenizer; returns transformers' model."""
  ids = dict(eos_token_id=1, decoder_start_token_id=0, pad_token_id=0)
  if kind in _DECODERS:
    ids = dict(bos_token_id=2, eos_token_id=1)
  model = oracle.make(kind, vocab_size=VOCAB_SIZE, **ids, **options)
  model.save_pretrained(folder)
  write_tokenizer(folder, kind)
  return model


def write_config(folder):
  """Writes the config file of a short run."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'short.py'
  path.write_text(CONFIG)
  return path


def import_run(source, workdir, tokenizer=None, **kwargs):
  """Imports a checkpoint into a short run on one device; returns the lines."""
  path = str(write_config(workdir.parent))
  data = {'tokenizer': tokenizer} if tokenizer else {}
  options = run_config.read(merge(cli.load_config(path), {'data': data}))
  return import_run_lib.import_run(
    source, workdir, options, devices=jax.devices()[:1], **kwargs
  )


def assert_equal(a, b):
  """Asserts that two trees have the same arrays."""
  jax.tree.map(np.testing.assert_array_equal, a, b)


def published(kind):
  """The checkpoint, without weights, of a config.json that was published."""
  return open_checkpoint(pathlib.Path(__file__).parent / 'published' / kind)


class Runs:
  """An object whose unpickling would run code that creates a file."""

  def __init__(self, path):
    """Takes the path of the file that the code would create."""
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, 'w')
