"""A checkpoint is imported into a run, trained further, and exported."""

import json
import shlex
import shutil

import jax
import pytest
import safetensors
from tokenizers import processors

from moe_jax import cli, generate, interop, run_config
from moe_jax.config import merge, section_of
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import extra_ids
from moe_jax.finetuning import meaning
from moe_jax.interop import __main__ as interop_command
from moe_jax.interop import import_run as import_run_lib
from moe_jax.interop.export_run import export_run
from moe_jax.run_config import RunConfig
from moe_jax.training import loop, setup, trained
from tests.generation import folders as run_folders
from tests.interop import folders, oracle
from tests.interop.folders import assert_equal, import_run
from tests.interop.test_parity import FEW_LAYERS
from tests.training import tiny as tiny_runs
from tests.training.conftest import _equal_runs_share_programs  # noqa: F401

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

PROMPT = 'def f(x):'
NEW = 6
ONE = dict(devices=jax.devices()[:1])
# With these options a decoder that was trained here is a Mixtral.
MIXTRAL = dict(
  ffn=dict(activation='swiglu'), norm=dict(epsilon=1e-5),
  embedding=dict(tie=False),
  moe=dict(
    layers='all', num_selected=2,
    router=dict(token_choice=dict(gates='renormalized')),
    capacity=dict(kind='all'), dispatch=dict(kind='dropless'),
  ),
)  # fmt: skip


def train(config, workdir, **kwargs):
  return loop.train_and_evaluate(
    run_config.read(config), workdir, **ONE, **kwargs
  )


def config_of(workdir):
  """The run's config, as `moe_jax.main` reads it."""
  return cli.config_of(str(workdir / 'this_config.py'))


def continues_with(model, folder, text):
  """Whether transformers continues the prompt with this text."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  inputs = tokenizer(PROMPT, return_tensors='pt')
  with torch.no_grad():
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)[0]
  return tokenizer.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.slow
def test_in_on_and_out(tmp_path, capsys):
  source, workdir = tmp_path / 'hf', tmp_path / 'run'
  folders.write(source, 'nllb-moe', **FEW_LAYERS['nllb-moe'])
  lines = import_run(source, workdir)
  assert '1 x cpu' in lines[0]
  corpus = dict(python_stdlib_docstrings=dict(modules='email,json'))
  bare = dict(
    evals={}, checkpoint=dict(best_eval='train_capacity', keep_best=False)
  )
  config = merge(config_of(workdir), {'data': {'source': corpus}, **bare})
  state = train(config, workdir, resume=True)
  assert int(state.step) == 2
  capsys.readouterr()
  # The tokenizer with its roles was imported too, and generation uses them.
  options = ['--workdir', str(workdir), '--num_tokens', str(NEW)]
  generate.main([*options, '--prompt', PROMPT])
  text = capsys.readouterr().out.removesuffix('\n')
  tokenizer = tokenizers.load(workdir / 'tokenizer.json')
  chat = tokenizer.encode_chat([{'role': 'user', 'content': 'f'}])
  assert chat.tolist() == [2, *tokenizer.encode('f').tolist(), 1]
  # The exported checkpoint has the same weights and generates the same text.
  output = tmp_path / 'out'
  assert 'step 2' in export_run(workdir, output)[0]
  model, info = oracle.CLASSES['nllb-moe'].from_pretrained(
    output, output_loading_info=True
  )
  assert not any(info.values())
  assert continues_with(model.eval(), output, text)
  exported = interop.load(output).variables
  assert_equal(exported['params'], state.params)


def test_the_default_config_is_one_to_go_on_with(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # the folder has no configs
  folders.write(tmp_path / 'hf', 'mixtral')
  # Weights of other libraries stay behind.
  (tmp_path / 'hf' / 'tf_model.h5').write_bytes(b'')
  (tmp_path / 'hf' / 'pytorch_model.bin.index.json').write_text('{}')
  import_run_lib.import_run(
    tmp_path / 'hf', tmp_path / 'run', RunConfig(), **ONE
  )
  corpus = dict(python_stdlib=dict(modules='email'))
  config = merge(config_of(tmp_path / 'run'), dict(data=dict(source=corpus)))
  run = setup.set_up(
    run_config.read(config), tmp_path / 'run', resume=True, **ONE
  )
  _, state, _ = setup.begin(run)
  imported = interop.load(tmp_path / 'hf').variables
  assert_equal(state.params, imported['params'])
  assert int(state.step) == 0 and len(run.evaluations) == 3
  kept = {path.name for path in (tmp_path / 'run' / 'huggingface').iterdir()}
  assert kept == {
    'chat_template.jinja', 'config.json', 'generation_config.json',
    'tokenizer.json', 'tokenizer_config.json',
  }  # fmt: skip


def test_a_run_says_how_its_model_is_computed_and_no_more(tmp_path):
  folders.write(tmp_path / 'hf', 'switch_transformers')
  changed = dict(remat='full', scan_layers=False, dropout=0.3, width=14)
  changed |= dict(attention=dict(implementation='einsum', num_heads=7))
  config = merge(section_of(RunConfig), dict(model=changed))
  workdir = tmp_path / 'run'
  import_run_lib.import_run(
    tmp_path / 'hf', workdir, run_config.read(config), **ONE
  )
  run = trained.read(workdir, tokenizer_needed=False).model
  imported = interop.load(tmp_path / 'hf').options
  assert (run.remat, run.scan_layers) == ('full', False)
  assert run.attention.implementation == 'einsum'
  # Training options that the checkpoint has are kept.
  assert run.dropout == imported.dropout == 0.1
  assert run.moe == imported.moe
  assert meaning.difference(run, imported) == {}


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch):
  run_folders.write(tmp_path / 'run', model=dict(num_layers=1, **MIXTRAL))
  output = tmp_path / 'out'

  def killed(*_):
    assert not output.exists()
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(f'{export_run.__module__}.write_tokenizer', killed)
    # A kill cleans nothing up.
    patch.setattr(shutil, 'rmtree', lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
      export_run(tmp_path / 'run', output)
  left = {path.name for path in tmp_path.iterdir()} - {'run'}
  (unfinished,) = left
  assert unfinished.startswith('.out.unfinished-')
  export_run(tmp_path / 'run', output)
  assert (output / 'tokenizer.json').exists()
  # Earlier releases of transformers refuse files that do not say this.
  with safetensors.safe_open(output / 'model.safetensors', 'np') as file:
    assert file.metadata() == {'format': 'pt'}
  assert {path.name for path in tmp_path.iterdir()} == {'run', 'out'}


def test_imported_files_end_inputs_as_the_run_does(tmp_path):
  source, workdir = tmp_path / 'hf', tmp_path / 'run'
  folders.write(source, 'mixtral')
  # Llama's files say so too; then transformers does not read tokenizer.json.
  path = source / 'tokenizer_config.json'
  said = {'add_bos_token': True, 'add_eos_token': False}
  path.write_text(json.dumps(json.loads(path.read_text()) | said))
  file, config = tokenizers.read(source), path.read_text()
  model = file.model
  model.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 2)]
  )
  model.enable_padding(length=20, pad_id=0, pad_token='<pad>')
  model.save(str(source / 'tokenizer.json'))
  import_run(source, workdir)
  own = tokenizers.load(workdir / 'tokenizer.json')
  for ends in (False, True):
    tokenizer = extra_ids.extend(own, end_inputs=ends)
    tokenizer.save(workdir / 'tokenizer.json')
    output = tmp_path / f'{ends}'
    line = export_run(workdir, output)[-1]
    assert line.endswith('inputs end in an EOS, as here') == ends
    exported = transformers.AutoTokenizer.from_pretrained(output)
    ids = exported(PROMPT).input_ids
    assert ids == tokenizer.encode_inputs(PROMPT).tolist()
    assert ids == [2, *own.encode(PROMPT).tolist(), *[1] * ends]
    same = (output / 'tokenizer_config.json').read_text() == config
    assert same == (not ends)


def test_a_checkpoint_without_a_tokenizer_is_given_one(tmp_path):
  source, workdir = tmp_path / 'hf', tmp_path / 'run'
  folders.write(source, 'mixtral')
  (source / 'tokenizer.json').rename(tmp_path / 'tokenizer.json')
  (source / 'tokenizer_config.json').unlink()
  (source / 'spiece.model').write_bytes(b'')
  with pytest.raises(ValueError, match=r'has no tokenizer\.json'):
    import_run(source, workdir)
  (source / 'spiece.model').unlink()
  *_, line = import_run(source, workdir)
  with pytest.raises(ValueError, match='without one was imported, train it'):
    trained.read(workdir)
  # The printed command works once the path of a tokenizer is in it.
  command = shlex.split(line.removeprefix('go on: python -m moe_jax.main '))
  config_flag, _, resume, *overrides = [
    word.replace('TOKENIZER', str(tmp_path / 'tokenizer.json'))
    for word in command
  ]
  assert resume == '--resume'
  config = cli.config_of(config_flag.removeprefix('--config='), overrides)
  run = setup.set_up(run_config.read(config), workdir, resume=True, **ONE)
  assert int(setup.begin(run)[1].step) == 0
  # A tokenizer that is given to the import makes the run readable at once.
  file = {'kind': 'file', 'file': {'path': str(tmp_path / 'tokenizer.json')}}
  import_run(source, tmp_path / 'second', tokenizer=file)
  tokenizer = tokenizers.read(tmp_path / 'tokenizer.json')
  for folder in (workdir, tmp_path / 'second'):
    assert trained.read(folder).tokenizer.identity == tokenizer.identity
  assert config_of(tmp_path / 'second').data.tokenizer.file.path == str(
    (tmp_path / 'second' / 'tokenizer.json').resolve()
  )
  # Neither an import nor an export overwrites what is there.
  with pytest.raises(ValueError, match='is there already'):
    import_run(source, workdir)
  with pytest.raises(ValueError, match='give a new or empty folder'):
    export_run(workdir, source)


def test_half_precision_and_an_embedding_for_each_half_go_in_and_out(tmp_path):
  source, workdir = tmp_path / 'hf', tmp_path / 'run'
  folders.write(source, 'switch_transformers', tie_word_embeddings=False)
  import_run(source, workdir, dtype='bfloat16')
  assert config_of(workdir).model.numerics.param_dtype == 'bfloat16'
  imported = interop.load(source, dtype='bfloat16').variables
  assert 'encoder_embedding' in imported['params']
  export_run(workdir, tmp_path / 'out')
  exported = interop.load(tmp_path / 'out').variables
  assert_equal(exported['params'], imported['params'])
  kind = oracle.CLASSES['switch_transformers']
  model = kind.from_pretrained(tmp_path / 'out')
  assert model.dtype == torch.bfloat16


def test_out_of_a_run_with_a_users_class_by_leave(tmp_path, capsys):
  source = dict(kind='tests.own_kinds:Counting')
  run_folders.write(tmp_path / 'run', data=dict(source=source), model=MIXTRAL)
  command = ['export', '--workdir', str(tmp_path / 'run')]
  command += ['--output', str(tmp_path / 'out')]
  leave = '--allow_module=tests.own_kinds'
  for options, status in (([], 1), ([leave], 0)):
    with pytest.raises(SystemExit) as ended:
      interop_command.main([*command, *options])
    assert ended.value.code == status
  printed = capsys.readouterr()
  assert f'if you trust it, pass {leave}' in printed.err
  assert 'step 3 written to' in printed.out


def test_out_of_a_run_that_began_here(tmp_path):
  folders.write_tokenizer(tmp_path, 'mixtral')
  tokenizer = tokenizers.Json.from_folder(tmp_path)
  params = run_folders.write(
    tmp_path / 'run', tokenizer=tokenizer, model=MIXTRAL
  )
  export_run(tmp_path / 'run', tmp_path / 'out')
  _, model, exported = interop.load(tmp_path / 'out')
  assert_equal(exported['params'], params[3])
  hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert (hf_tokenizer.bos_token, hf_tokenizer.eos_token) == ('<s>', '</s>')
  assert hf_tokenizer(PROMPT)['input_ids'] == tokenizer.encode(PROMPT).tolist()
  assert model.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    # A value that config.json cannot have hides none of the other differences.
    (
      dict(ffn={}, moe=dict(num_selected=1, layers='every 2')),
      "hidden_act='gelu' is | moe.expert.activation: 'gelu', not 'swiglu' | "
      "moe.capacity.kind: 'per_token', not 'all' | num_experts_per_tok=1 is | "
      "moe.router.gates: 'raw', not 'renormalized' | "
      'which layers are sparse: (False, True), not (True, True)',
    ),
    (
      dict(norm=dict(kind='layernorm', epsilon=1e-5)),
      "as mixtral; the model has | norm.kind: 'layernorm', not 'rmsnorm'",
    ),
    (
      dict(num_layers=3, moe=dict(MIXTRAL['moe'], layers='0,1')),
      'which layers are sparse: (True, True, False), not (True, T',
    ),
    # No decoder there has these positions or this router.
    (
      dict(
        positions=dict(kind='learned'),
        moe=dict(MIXTRAL['moe'], router=dict(kind='hash')),
      ),
      "positions.kind: 'learned', not 'rotary' | moe.router.kind: 'hash', not "
      "'token_choice' | moe.router.gates: absent, not 'renormalized'",
    ),
    (dict(moe=dict(num_experts=0, layers='none')), 'it is dense; mixtral has'),
  ],
)
def test_what_transformers_has_no_model_of(changes, parts, tmp_path):
  # It is refused before parameters are read, and nothing is written.
  options = tiny_runs.options(model=MIXTRAL | changes).filled(257).model
  with pytest.raises(ValueError) as caught:
    interop.save(options, {'params': {}}, tmp_path / 'out')
  for part in parts.split(' | '):
    assert part in str(caught.value)
  assert not (tmp_path / 'out').exists()
