"""One translation model for many languages, which share its experts.

Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), section 5.4, put one
sparse layer into the encoder and one into the decoder of a translation model,
and trained it on twelve pairs of languages. This model translates the texts
of django's interface (`pip install django`) from English into twelve languages,
with the name of the language before each text. All other layers are those of a
Transformer, not LSTMs with attention as in the paper. As in the paper, tokens
choose 4 of 32 experts by noisy top-4, with weights of 0.01 on importance and
load losses. Without dropout the 9,410 pairs are soon memorised; with dropout
the run takes eleven minutes on two cores and ends at a validation loss of 1.71
nats per byte.

    python -m moe_jax.main --config=moe_jax:shazeer_multilingual \
      --workdir=runs/shazeer_multilingual
"""

from moe_jax.configs import base

LANGUAGES = 'de,fr,es,pt,it,nl,sv,pl,cs,ru,ja,ko'


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 32
  config.total_steps = 1500
  config.data.task.kind = 'seq2seq'
  config.data.source.kind = 'django_gettext'
  config.data.source.django_gettext.languages = LANGUAGES
  config.data.seq_len = 128
  config.data.target_len = 160
  m = config.model
  m.kind = 'encoder_decoder'
  m.num_layers = 2
  m.width = 128
  m.attention.scale = 'none'
  m.ffn.hidden = 512
  m.ffn.activation = 'relu'
  m.positions.kind = 'relative'
  m.embedding.logits_scale = 'inverse_sqrt_width'
  m.numerics.init.embedding_std = 1.0
  m.scan_layers = False
  m.dropout = 0.1
  m.moe.layers = 'every 2'
  m.moe.num_experts = 32
  m.moe.num_selected = 4
  m.moe.group_size = -1
  m.moe.expert.hidden = 128
  m.moe.router.kind = 'noisy_top_k'
  r = m.moe.router.noisy_top_k
  r.gates = 'renormalized'
  r.balance_weight = 0.0
  r.z_weight = 0.0
  r.importance_weight = 0.01
  r.load_weight = 0.01
  m.moe.capacity.kind = 'all'
  m.moe.dispatch.kind = 'dropless'
  config.optimizer.learning_rate = 3e-3
  config.optimizer.weight_decay = 0.0
  config.checkpoint.best_eval = 'valid'
  config.sample.prompt = 'de: Please enter a date'
  config.sample.num_tokens = 64
  config.sample.temperature = 0.0
  config.evals = {
    'valid': base.evaluation(every_steps=500, num_batches=16),
    'generate': base.generate_evaluation(num_examples=96, num_tokens=96),
  }
  return base.finish(config, arg)
