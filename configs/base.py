"""Every key with its default; a config changes only what differs from these.

    def get_config(arg=''):
      config = base.get_config()
      config.model.width = 256
      return base.finish(config, arg)

Values keep one type each. Sizes are global, lengths are in tokens, periods in
optimizer steps.
"""

import ml_collections

ConfigDict = ml_collections.ConfigDict

RUNLOCAL = 'runlocal'


def get_config() -> ConfigDict:
  """The defaults, locked against new keys (but for `evals`), not new values."""
  config = ConfigDict()
  config.seed = 0
  config.total_steps = 1000
  config.batch_size = 32  # sequences per optimizer step
  config.microbatches = 1  # gradient accumulation; divides batch_size
  config.log_every_steps = 20
  config.logits_z_weight = 0.0  # of mean logsumexp(logits)^2; T5 has 1e-4
  # Steps of a loss or gradient that is not finite: so many are left out, their
  # batches kept in the workdir, and the next one stops the run.
  config.max_nonfinite_steps = 0
  config.data = data()
  config.model = model()
  config.optimizer = optimizer()
  config.checkpoint = ConfigDict(
    dict(
      # Of this run alone: 'gs://bucket/run'; '': in the workdir.
      directory='',
      every_steps=500,  # also written at the end and on SIGTERM; 0: only then
      keep_newest=2,
      keep_best=True,
      # The evaluation whose loss is compared; a checkpoint of a step at which
      # it did not run is never the best.
      best_eval='train_capacity',
      # Of storage errors that may pass by themselves (no full disk is one).
      # Several processes write arrays once: they try again all but these.
      tries=3,  # the first counted; above 1, a save takes a copy on the host
      retry_seconds=1.0,  # before the second try, then twice as long each time
    )
  )
  config.init_from = init_from()
  config.evals = ConfigDict(
    dict(
      train_capacity=evaluation(),
      # Twice the room that balanced experts need.
      capacity_2=evaluation(
        moe=dict(
          capacity_rule='per_assignment',
          capacity_factor=2.0,
          dispatch='gather',
        )
      ),
      all_tokens=evaluation(moe=dict(capacity_rule='all', dispatch='dropless')),
    )
  )
  # The size of each mesh axis within a slice (devices with a fast network);
  # -1 is what is left of them. A dcn_ size is how many slices the axis spans.
  config.mesh = ConfigDict(
    dict(
      data=-1,
      fsdp=1,
      expert=1,
      tensor=1,
      dcn_data=1,
      dcn_fsdp=1,
      dcn_expert=1,
      dcn_tensor=1,
    )
  )
  # Logical axis -> mesh axes, comma-separated; '' keeps the axis whole.
  config.sharding = ConfigDict(
    dict(
      batch='data,fsdp,expert',
      embed='fsdp',
      mlp='tensor',
      heads='tensor',
      kv_heads='',
      kv='',
      vocab='tensor',
      expert='expert',
      expert_mlp='tensor',
      expert_choice='',
      layers='',
      positions='',
      buckets='',
    )
  )
  # Of several processes, in seconds; see `moe_jax.distributed.Timeouts`.
  config.distributed = ConfigDict(
    dict(
      initialization_timeout_seconds=300,  # in which all have to be there
      heartbeat_timeout_seconds=100,  # who does not answer for so long is dead
      # All end if none got further for so long: longer than the data's
      # preparation, a step that compiles, an evaluation or a save. 0: never.
      stall_timeout_seconds=900,
    )
  )
  # Steps that are traced, in workdir/profile; see experiments/pods.md.
  config.profile = ConfigDict(
    dict(
      start_step=10,  # the first of them, counted from 1
      num_steps=0,
      all_processes=False,  # or process 0 alone
    )
  )
  config.sample = ConfigDict(
    dict(prompt='\n', num_tokens=300, temperature=0.8, seed=0)
  )
  config.lock()
  config.evals.unlock()  # a config adds its own by name
  return config


def init_from() -> ConfigDict:
  """Another run whose parameters this one begins with, with a new optimizer.

  Where this one's model has experts and the other's has not, or not as many,
  experts are copies; see `moe_jax.finetuning`.
  """
  return ConfigDict(
    dict(
      workdir='',  # '': none; parameters are drawn from the seed
      step=-1,  # of its checkpoint; -1: the newest good one
      experts='',  # the source of each expert, '0,1,0,1'; '': in order, again
      router_std=0.0,  # of routers that are new; 0.0: as the model draws them
      # Of normal noise on each copy of an expert but the first, and on its
      # router column, as fractions of the root mean square.
      expert_noise=0.0,
      router_noise=0.0,
    )
  )


def data() -> ConfigDict:
  """Where the text comes from; see `moe_jax.data`."""
  return ConfigDict(
    dict(
      # Or 'files:<glob>', 'tfds:<name>'; synthetic: 'cipher:<K>'. Pairs, of
      # seq2seq: 'python_stdlib_docstrings', 'django_gettext:<languages>',
      # 'tfds:<name>'; synthetic: 'kv_recall:<N>'. Of classes:
      # 'vowels', 'files:<path>', 'digits', 'jittered_digits', 'tfds:<name>',
      # 'npz:<path>'.
      source='python_stdlib',
      tokenizer='bytes',  # or 'chars', 'json:<path>'
      seq_len=256,  # T; of an encoder-decoder T_enc
      target_len=0,  # T_dec; 0: a decoder-only model
      task='lm',  # prefix_lm, span_corruption, ul2, seq2seq, classes
      pack=True,  # short examples share a row; lm always does
      text_feature='text',  # the TFDS feature; not of seq2seq
      input_feature='inputs',  # of seq2seq, such as 'translation/de'
      target_feature='targets',
      input_prefix='',  # of seq2seq, before all inputs: 'summarize: '
      noise_density=0.15,  # of span_corruption
      mean_noise_span=3.0,  # of span_corruption, in tokens
      num_sentinels=100,  # of span_corruption and ul2
      final_sentinel=True,  # ends the targets; T5's checkpoints have none
      # Of ul2: (mode, mean span, density, weight); the span of S is its suffix.
      denoisers=(
        ('R', 3.0, 0.15, 1.0),
        ('R', 8.0, 0.15, 1.0),
        ('S', 0.0, 0.25, 1.0),
        ('X', 3.0, 0.5, 1.0),
        ('X', 8.0, 0.5, 1.0),
        ('X', 64.0, 0.15, 1.0),
        ('X', 64.0, 0.5, 1.0),
      ),
      train_split='train',
      validation_split='validation',
      cache_dir='',  # '': $MOE_JAX_CACHE, else ~/.cache/moe_jax
    )
  )


def model() -> ConfigDict:
  """A Transformer; see `moe_jax.models`."""
  return ConfigDict(
    dict(
      kind='decoder',  # encoder_decoder, lstm, adaptive, deep_moe
      vocab_size=0,  # 0: the tokenizer's
      feature_shape=(),  # of an example that is no text; (): the data's
      num_layers=4,  # of the decoder
      num_encoder_layers=0,  # of an encoder-decoder; 0: num_layers
      width=128,
      num_heads=4,
      encoder_heads=0,  # 0: num_heads
      num_kv_heads=0,  # 0: num_heads
      head_width=0,  # 0: width / num_heads
      hidden=512,  # of dense feed-forwards
      encoder_hidden=0,  # 0: hidden
      activation='gelu',  # relu, gelu, gelu_tanh, geglu, swiglu
      norm='rmsnorm',  # or layernorm
      norm_epsilon=1e-6,
      norm_scale=True,
      positions='rotary',  # learned, relative, sinusoidal, none
      position_offset=0,  # of sinusoids
      relative_buckets=32,
      relative_max_distance=128,
      rope_theta=10000.0,
      attention='auto',  # einsum, xla, cudnn, splash
      attention_scale='head_width',  # head_width^-0.5; none (T5)
      sliding_window=0,  # tokens that a causal one sees; 0: all
      max_len=0,  # of learned positions; 0: data.seq_len
      use_bias=False,
      tie_embeddings=True,
      embedding_scale='none',  # sqrt_width
      logits_scale='none',  # inverse_sqrt_width (T5, tied)
      dropout=0.0,
      dtype='float32',  # or bfloat16; routers, norms and losses stay float32
      param_dtype='float32',
      scan_layers=True,
      remat='none',  # full, dots; saves memory with scan_layers
      init=dict(kind='fan_in', scale=1.0, embedding_std=0.02),
      lstm=lstm(),
      moe=moe(),
      adaptive=adaptive(),
      deep_moe=deep_moe(),
    )
  )


def lstm() -> ConfigDict:
  """Of kind lstm: layers that `moe.layers` leaves out are LSTMs."""
  return ConfigDict(
    dict(
      hidden=0,  # cells; where not 0, which is width, outputs are projected
      forget_bias=1.0,  # at the start
      unroll=1,  # steps in one round of the loop over a row
      # Hidden layers of the feed-forward that is moe.num_experts=0: 1, of width
      # num_selected * moe.hidden; above, each of moe.hidden.
      twin_depth=1,
    )
  )


def moe() -> ConfigDict:
  """The sparse layers; see `moe_jax.layers.RouterConfig` for each option."""
  return ConfigDict(
    dict(
      num_experts=8,  # 0: the dense twin, of width num_selected * hidden
      num_selected=1,
      # Of two levels: a gate over branches, each of num_experts / branching
      # experts, and in each chosen one a gate that selects
      # num_selected / branches_selected of its own. 0: one level.
      branching=0,
      branches_selected=1,
      layers='every 2',  # all, none, 'last 1', '1,3'
      encoder_layers='',  # '': layers
      hidden=0,  # of one expert; 0: model.hidden
      activation='',  # '': model.activation
      extra_ffn=False,  # a dense feed-forward after each sparse one
      expert_dropout=-1.0,  # -1.0: model.dropout
      # noisy_top_k, expert_choice, strictly_balanced, hash, random
      router='token_choice',
      hash_of='token',  # of router='hash': bigram, position
      router_seed=0,  # of the tables of hash, and of random in evaluation
      gates='raw',  # renormalized, renormalized_after_drop, sigmoid
      slot_priority='token_major',  # choice_major, batch_priority
      encoder_slot_priority='',  # '': slot_priority
      second_policy='all',  # sampled, threshold
      second_threshold=0.2,
      jitter=0.0,
      router_bias=False,
      served_by='chosen',  # transformers_nllb
      output_masking=0.0,  # rate at which experts' outputs are masked
      route_padding=False,
      group_size=0,  # tokens; 0: one sequence; -1: the whole batch
      capacity_rule='per_token',  # per_assignment, fraction, fixed, all
      capacity_factor=1.25,
      capacity_rounding='ceil',  # floor, round
      capacity_multiple=1,
      capacity_minimum=1,
      capacity_slots=0,  # of capacity_rule='fixed'
      dispatch='gather',  # einsum; dropless, with capacity_rule='all'
      grouped_matmul='auto',  # of dropless; see `moe_jax.kernels`
      # Where experts are split over devices; see `moe_jax.parallel.exchange`.
      exchange='constraint',  # all_to_all
      exchange_chunks=1,  # pieces whose travel and products may overlap
      exchange_dtype='',  # bfloat16, float32; '': model.dtype
      balance_choices='all',  # or first
      balance_bias_rate=0.0,  # of Loss-Free Balancing; with balance_weight=0.0
      balance_weight=0.01,
      z_weight=0.001,
      importance_weight=0.0,
      load_weight=0.0,  # of noisy_top_k; of strictly_balanced's thresholds
      layer_reduce='sum',  # of the losses over sparse layers; or mean
      allow_future_leak=False,
    )
  )


def adaptive() -> ConfigDict:
  """Of kind='adaptive'; see `moe_jax.models.AdaptiveConfig`."""
  return ConfigDict(
    dict(
      loss='competitive',  # gated, cooperative
      num_experts=4,
      expert_hidden=0,  # logistic units in an expert; 0: linear
      gate_hidden=0,  # in the gate
      expert_output='softmax',  # logistic, linear
      init_scale=0.5,  # weights start uniform within so much of zero
    )
  )


def deep_moe() -> ConfigDict:
  """Of kind='deep_moe', a size a layer; see `moe_jax.models.DeepMoeConfig`."""
  return ConfigDict(
    dict(
      num_experts=(4, 4),
      hidden=(100, 100),  # units of each expert
      gate_hidden=(50, 50),  # units of each gating network's hidden layer
      # Of the balancing constraint: gates, summed, above the experts' mean.
      margin=32.0,
      balance_steps=0,  # for which it is in force; 0: never, -1: always
    )
  )


def optimizer() -> ConfigDict:
  """Optax by name; see `moe_jax.training.optimizer`."""
  return ConfigDict(
    dict(
      name='adamw',  # or adafactor
      learning_rate=1e-3,
      schedule='cosine',  # inverse_sqrt, constant
      warmup_steps=100,
      final_fraction=0.1,  # of learning_rate, at the end of the cosine
      b1=0.9,
      b2=0.98,
      epsilon=1e-8,
      clip_norm=1.0,  # 0.0: none
      adafactor_decay_rate=0.8,
      adafactor_min_dim_size=128,  # smaller dimensions are not factored
      weight_decay=0.1,
      # (pattern, factor) pairs; the first whose regular expression is found in
      # the parameter's name counts: 'layers/layer_1/moe/experts/w_in'.
      weight_decay_rules=(
        (r'(bias|scale|embedding|table|b_\w+)$', 0.0),
        ('', 1.0),
      ),
      learning_rate_rules=(('', 1.0),),
    )
  )


def evaluation(every_steps: int = 500, num_batches: int = 0, **overrides):
  """An entry of `evals`, of kind 'loss': on the validation split.

  Args:
    every_steps: Its period; it also runs at the end.
    num_batches: 0 is the whole split, else that many batches spread over it.
    **overrides: What the model has otherwise (`config.model` keys, nested).
  """
  return ConfigDict(
    dict(
      kind='loss',
      every_steps=every_steps,
      num_batches=num_batches,
      model_overrides=overrides,
    )
  )


def classify_evaluation(
  every_steps: int = 500, num_batches: int = 0, **overrides
):
  """An entry of `evals`: how often an example's class is the largest output.

  Of the task 'classes'. See `moe_jax.evaluation.classify`.

  Args:
    every_steps: As in `evaluation`.
    num_batches: Likewise.
    **overrides: Likewise.
  """
  entry = evaluation(every_steps, num_batches, **overrides)
  entry.kind = 'classify'
  return entry


def generate_evaluation(
  every_steps: int = 0,
  *,
  num_examples: int = 64,  # validation pairs, spread over the split; 0: all
  max_new_tokens: int = 64,
  num_beams: int = 1,  # 1: the likeliest token each time
  length_penalty: float = 1.0,  # of beam search
  metrics: str = 'bleu,chrf,rouge_l,exact_match',  # some of these
  bleu_tokenizer: str = '13a',  # sacrebleu's name: intl, zh, char, none
  **overrides,
):
  """An entry of `evals`: outputs for validation inputs, scored by targets.

  Of the tasks seq2seq and prefix_lm. Nothing is dropped, as wherever text is
  generated, but by a rule of the checkpoint's own. See
  `moe_jax.evaluation.generated_text`.

  Args:
    every_steps: Its period; it also runs at the end. 0: only then.
    **overrides: As in `evaluation`.
  """
  return ConfigDict(
    dict(
      kind='generate',
      every_steps=every_steps,
      num_examples=num_examples,
      max_new_tokens=max_new_tokens,
      num_beams=num_beams,
      length_penalty=length_penalty,
      metrics=metrics,
      bleu_tokenizer=bleu_tokenizer,
      model_overrides=overrides,
    )
  )


def choice_evaluation(
  every_steps: int = 0,
  *,
  source: str = 'docstring_choice',  # or 'files:<glob>', 'tfds:<name>'
  num_items: int = 128,  # of the validation split, spread over it; 0: all
  num_shots: int = 0,  # train examples with their answers before each prompt
  shots_source: str = '',  # where those come from; '': source
  normalize: str = 'tokens',  # log-likelihoods, by answer; none, bytes
  answer_prefix: str = '\n',  # between a prompt and its answer
  train_split: str = 'train',
  validation_split: str = 'validation',
  prompt_feature: str = 'prompt',  # of a TFDS dataset
  answers_feature: str = 'answers',  # or one of each: 'sol1,sol2'
  label_feature: str = 'label',
  **overrides,
):
  """An entry of `evals`: how often the right answer is the likeliest.

  Without overrides there is room for every token, as in generation. See
  `moe_jax.evaluation.choice`.

  Args:
    every_steps: Its period; it also runs at the end. 0: only then.
    **overrides: As in `evaluation`.
  """
  room = dict(moe=dict(capacity_rule='all', dispatch='dropless'))
  return ConfigDict(
    dict(
      kind='choice',
      every_steps=every_steps,
      source=source,
      num_items=num_items,
      num_shots=num_shots,
      shots_source=shots_source,
      normalize=normalize,
      answer_prefix=answer_prefix,
      train_split=train_split,
      validation_split=validation_split,
      prompt_feature=prompt_feature,
      answers_feature=answers_feature,
      label_feature=label_feature,
      model_overrides=overrides or room,
    )
  )


def finish(config: ConfigDict, arg: str = '') -> ConfigDict:
  """The last line of every config: applies `:runlocal` and locks.

  Raises:
    ValueError: `arg` is neither '' nor 'runlocal'.
  """
  if arg not in ('', RUNLOCAL):
    raise ValueError(f"unknown config argument {arg!r}; have ['', 'runlocal']")
  return (_shrunk(config) if arg else config).lock()


_SHRUNK_EVALS = {
  'loss': dict(num_batches=1),
  'classify': dict(num_batches=1),
  'generate': dict(num_examples=3, max_new_tokens=4, bleu_tokenizer='13a'),
  'choice': dict(
    source='docstring_choice',
    num_items=3,
    shots_source='',
    train_split='train',
    validation_split='validation',
  ),
}


def _shrunk(config: ConfigDict) -> ConfigDict:
  """The same structure at a laptop's size; text is the embedded corpus."""
  if config.data.task != 'classes':  # those are small
    _shrink_text(config.data)
  for name in config.mesh:
    config.mesh[name] = 1
  m = config.model
  m.vocab_size = 0
  m.num_layers = max(2, _layers_named(m.moe.layers))
  m.num_encoder_layers = 0
  if m.moe.encoder_layers:
    m.num_encoder_layers = max(2, _layers_named(m.moe.encoder_layers))
  m.width = 32
  m.num_kv_heads = 2 if 0 < m.num_kv_heads < m.num_heads else 0
  m.num_heads = 4
  m.encoder_heads = 0
  m.head_width = 16 if m.head_width else 0
  m.hidden = 48
  m.encoder_hidden = 0
  m.sliding_window = min(m.sliding_window, 8)
  m.max_len = 0
  m.dtype = m.param_dtype = 'float32'
  m.attention = 'auto'
  m.lstm.hidden = 24 if m.lstm.hidden else 0
  m.deep_moe.balance_steps = min(m.deep_moe.balance_steps, 1)
  m.moe.hidden = 40 if m.moe.hidden else 0
  if m.moe.num_experts:
    m.moe.num_experts = max(min(m.moe.num_experts, 4), m.moe.num_selected)
    m.moe.branching = min(m.moe.branching, m.moe.branches_selected)
  if m.moe.group_size > 0:
    m.moe.group_size = 64
  config.batch_size = 4
  config.microbatches = min(config.microbatches, 2)
  config.total_steps = 2
  config.log_every_steps = 1
  config.optimizer.warmup_steps = 1
  config.checkpoint.every_steps = 0
  config.sample.num_tokens = 16
  for entry in config.evals.values():
    entry.every_steps = 2
    entry.update(_SHRUNK_EVALS[entry.kind])
  return config


def _shrink_text(data: ConfigDict) -> None:
  pairs = data.task == 'seq2seq'
  data.source = f'python_stdlib{"_docstrings" * pairs}'
  data.tokenizer = 'bytes'
  data.seq_len = 32
  data.target_len = 24 if data.target_len else 0
  data.text_feature = 'text'
  data.input_feature = 'inputs'
  data.target_feature = 'targets'
  data.train_split = 'train'
  data.validation_split = 'validation'


def _layers_named(layers: str) -> int:
  """How many layers the pattern needs: 6 for 'every 6', 4 for '1,3'."""
  word, _, number = layers.partition(' ')
  if word in ('every', 'last'):
    return int(number)
  named = [
    int(part) + 1 for part in layers.split(',') if part.strip().isdigit()
  ]
  return max(named, default=2)
