"""A first encoder-decoder: docstrings of Python's own standard library.

The model reads a function and writes its docstring, as bytes. It has T5's
layout with 8 Switch experts in the second layer of encoder and decoder. It
trains for a few minutes on two cores, and nothing is downloaded. At the end it
documents `config.sample.prompt`, taking the likeliest byte each time, and 48
functions of the validation split, for which scores are printed.

    python -m moe_jax.main --config=moe_jax:tiny_seq2seq \
      --workdir=runs/tiny_seq2seq
"""

from moe_jax.configs import base

PROMPT = """def read_lines(path):
    with open(path) as file:
        return file.readlines()
"""


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 16
  config.total_steps = 1000
  config.data.task.kind = 'seq2seq'
  config.data.source.kind = 'python_stdlib_docstrings'
  config.data.seq_len = 256
  config.data.target_len = 96
  m = config.model
  m.kind = 'encoder_decoder'
  m.num_layers = 2
  m.width = 128
  m.attention.num_heads = 4
  m.attention.scale = 'none'
  m.ffn.hidden = 512
  m.ffn.activation = 'relu'
  m.positions.kind = 'relative'
  m.embedding.logits_scale = 'inverse_sqrt_width'
  m.numerics.init.embedding_std = 1.0
  m.scan_layers = False
  m.moe.num_experts = 8
  m.moe.num_selected = 1
  m.moe.layers = 'every 2'
  m.moe.router.token_choice.jitter = 0.01
  config.optimizer.learning_rate = 3e-3
  config.checkpoint.every_steps = 250
  config.sample.prompt = PROMPT
  config.sample.num_tokens = 96
  config.sample.temperature = 0.0
  for entry in config.evals.values():
    entry.every_steps = 250
    entry.num_batches = 8
  config.evals.generate = base.generate_evaluation(
    num_examples=48, num_tokens=96
  )
  return base.finish(config, arg)
