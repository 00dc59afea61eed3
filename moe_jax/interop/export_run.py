"""Export of a run's checkpoint and tokenizer as a folder for transformers."""

import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any, cast

import jax
import tokenizers as library

from moe_jax.config import read_options
from moe_jax.data import plain_files, tokenizers
from moe_jax.data.cache_folders import whole_folder
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError
from moe_jax.interop.checkpoint_folder import architecture_of, small_files
from moe_jax.interop.saving import save
from moe_jax.models import code_trees
from moe_jax.models.expert_arrays import has_merged
from moe_jax.partitioning import MeshOptions
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training import trained

_CONFIG, _JSON = 'tokenizer_config.json', 'tokenizer.json'
_MODEL = 'tokenizer.model'
_EOS = '<eos>'
_ROLES = 'bos', 'eos', 'pad'


def write_tokenizer(tokenizer: Tokenizer | None, output: pathlib.Path) -> str:
  """Writes a tokenizer into an exported folder; returns a line about it.

  A tokenizer of bytes or characters becomes a `tokenizer.json` with the same
  ids. As in this package, the name of a special token within a text is read as
  plain text; but the names of ids that a task added are read as these ids, as
  this package reads them in inputs. For None nothing is written.
  """
  base, names = tokenizer, ()
  if isinstance(tokenizer, tokenizers.Extended):
    base, names = tokenizer.base, tokenizer.names
  if isinstance(base, tokenizers.SentencePiece):
    (output / _MODEL).write_bytes(base.content)
    return (
      f'{_MODEL} is the SentencePiece model; transformers converts it by rules '
      'of its own: compare its ids'
      + ', and it is without the ids that the task added' * bool(names)
      + '; inputs here end in an EOS' * getattr(tokenizer, 'end_inputs', False)
    )
  model = _model(base)
  if model is None:
    return 'transformers has no such tokenizer; the folder has none'
  # The library gives new names the ids behind the last id of the model.
  size = model.get_vocab_size(with_added_tokens=True)
  has_names = not names or cast(Any, tokenizer).token_id(names[0]) == size
  if has_names:
    model.add_special_tokens([*names])
  # A special token that the task added may not be in `model`.
  roles = {
    f'{role}_token': token
    for role in _ROLES
    if (token_id := getattr(tokenizer, f'{role}_id')) is not None
    and (token := model.id_to_token(token_id)) is not None
  }
  (output / _JSON).write_text(model.to_str(pretty=True), encoding='utf-8')
  config: dict[str, Any] = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    **roles,
  }
  if not isinstance(base, tokenizers.Json) and not names:
    config['split_special_tokens'] = True
  (output / _CONFIG).write_text(json.dumps(config, indent=2) + '\n')
  line = 'the tokenizer is there too'
  if not has_names:
    line += ', without the ids that the task added'
  return line + _end_inputs(output, tokenizer)


def _model(tokenizer: Tokenizer | None) -> library.Tokenizer | None:
  """The same tokenizer of the library `tokenizers`; None if there is none.

  There is one for a tokenizer.json, and for bytes and characters.
  """
  if isinstance(tokenizer, tokenizers.Json):
    return library.Tokenizer.from_str(tokenizer.model.to_str())
  if isinstance(tokenizer, tokenizers.Bytes):
    return _byte_model()
  if isinstance(tokenizer, tokenizers.Chars):
    return _character_model(tokenizer.characters)
  return None


def _end_inputs(folder: pathlib.Path, tokenizer: Tokenizer | None) -> str:
  """Makes a folder's tokenizer end inputs in an EOS, or not, as the run's does.

  Returns words about the change; '' if there is none.
  """
  path = folder / _JSON
  if not isinstance(tokenizer, tokenizers.Extended) or not path.exists():
    return ''
  model, eos_id = library.Tokenizer.from_file(str(path)), tokenizer.eos_id
  if eos_id is None or (eos := model.id_to_token(eos_id)) is None:
    return ''
  e, ends = model.encode(eos), tokenizer.end_inputs
  columns = zip(e.tokens, e.sequence_ids, e.attention_mask)
  tokens, parts = zip(*((t, part) for t, part, real in columns if real))
  start, size = parts.index(0), parts.count(0)  # of the text, not what is added
  begin, end = tokens[:start], tokens[start + size :]
  if ends == (end[-1:] == (eos,)):
    return ''
  new_end = [*end, eos] if ends else end[:-1]
  # A template cannot follow another one, which has added ids.
  old = None if model.num_special_tokens_to_add(False) else model.post_processor
  template = library.processors.TemplateProcessing(
    single=[*begin, '$A', *new_end],
    pair=[*begin, '$A', *new_end, '$B', *new_end],
    special_tokens=[(t, model.token_to_id(t)) for t in {*begin, *new_end}],
  )
  steps = [*filter(None, [old]), template]
  model.post_processor = library.processors.Sequence(steps)
  path.write_text(model.to_str(pretty=True), encoding='utf-8')
  config = plain_files.read_json(folder / _CONFIG)
  # With these keys, transformers makes the post-processor anew.
  if {'add_bos_token', 'add_eos_token'} & config.keys():
    text = json.dumps({**config, 'add_eos_token': ends}, indent=2)
    (folder / _CONFIG).write_text(text + '\n', encoding='utf-8')
  return f'; inputs {"end" if ends else "do not end"} in an EOS, as here'


def _byte_model() -> library.Tokenizer:
  """A byte-level tokenizer without merges; the id of a token is its byte."""
  alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  # Printable bytes are the characters that they encode; all other bytes, in
  # order, are the characters from U+0100 on.
  other_characters = iter(
    character for character in alphabet if ord(character) > 0xFF
  )
  vocabulary = {
    chr(byte) if chr(byte) in alphabet else next(other_characters): byte
    for byte in range(256)
  }
  model = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[]))
  model.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  model.decoder = library.decoders.ByteLevel()
  model.add_special_tokens([_EOS])
  return model


def _character_model(characters: str) -> library.Tokenizer:
  """A tokenizer whose ids index `characters`, which refuses all others."""
  vocabulary = {character: i for i, character in enumerate(characters)}
  model = library.Tokenizer(library.models.WordLevel(vocabulary, _EOS))
  model.pre_tokenizer = library.pre_tokenizers.Split(
    library.Regex(r'[\s\S]'), 'isolated'
  )
  model.decoder = library.decoders.Fuse()
  return model


def export_run(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  allow: Iterable[str] = (),
) -> list[str]:
  """Writes a run's newest good checkpoint for transformers to read.

  Quantised kernels are written as the numbers that their codes stand for.

  Args:
    workdir: The run's folder.
    output: A new or empty folder.
    allow: Modules whose classes may be imported where the run names them.

  Returns:
    Lines about the export, for printing.

  Raises:
    ValueError: The folder holds no run or no checkpoint, `output` is not empty,
      or transformers has no such model.
    CheckpointError: No checkpoint is good.
  """
  folder = pathlib.Path(workdir).expanduser()
  run = trained.load(
    folder, mesh=_mesh(folder), allow=allow, tokenizer_needed=False
  )
  imported_folder = folder / workdir_lib.IMPORTED
  output = pathlib.Path(output).expanduser()
  imported_config = plain_files.read_json(imported_folder / 'config.json')
  own_ids = {}
  if (tokenizer := run.options.tokenizer) is not None:
    own_ids = {
      'bos_token_id': tokenizer.bos_id,
      'eos_token_id': tokenizer.eos_id,
      'pad_token_id': tokenizer.pad_id,
      'decoder_start_token_id': tokenizer.start_id,
    }
  imported_files = _imported_files(imported_folder)
  model, params, lines = run.options.model, run.variables['params'], []
  if code_trees.has_codes(model):
    model, params = code_trees.decoded(cast(Any, model), params)
    lines = ['kernels in codes were written as numbers']
  if has_merged(run.model):
    lines.append(
      'columns of routers lead to the same experts, of which transformers '
      'needs a copy for each: the bytes are those of all columns, and do not '
      'fall'
    )
  with whole_folder(output) as unfinished:
    variables = {**run.variables, 'params': params}
    save(model, variables, unfinished, config=imported_config or own_ids)
    target = architecture_of(plain_files.read_json(unfinished / 'config.json'))
    tokenizer_line = _export_tokenizer(imported_files, unfinished, tokenizer)
  if target.needs_code:
    lines.append(
      f'it is written as {target.model_type}, for which transformers has no '
      'class: copy the published configuration and modeling files to the '
      'folder, and name them in auto_map of config.json'
    )
  return [
    f'checkpoint of step {run.step} written to {output}',
    *lines,
    tokenizer_line,
  ]


def _imported_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files that an imported run keeps of its source, besides the config.

  `folder`, in the run's folder, has them; without it there are none. A link is
  refused with a ValueError.
  """
  if folder.is_symlink():
    raise InputError(f'{folder} is a link, which is not followed')
  if not folder.is_dir():
    return []
  paths = small_files(folder)
  # Some file systems do not distinguish upper and lower case.
  return [path for path in paths if path.name.casefold() != 'config.json']


def _mesh(folder: pathlib.Path) -> jax.sharding.Mesh | None:
  """The run's mesh; None if the mesh does not fit this machine's devices."""
  mesh = workdir_lib.kept_config(folder).get('mesh', {})
  try:
    return read_options(MeshOptions, mesh, 'mesh.').make()
  except InputError:
    return None


def _export_tokenizer(
  imported: list[pathlib.Path],
  output: pathlib.Path,
  tokenizer: Tokenizer | None,
) -> str:
  """Copies the files imported with a model, or else writes the run's tokenizer.

  Returns a line about what was written, for printing.
  """
  for path in imported:
    shutil.copyfile(path, output / path.name)
  if imported:
    names = ', '.join(path.name for path in imported)
    line = f"the imported checkpoint's other files are there too: {names}"
    if isinstance(tokenizer, tokenizers.Extended) and tokenizer.names:
      line += '; they are without the ids that the task added'
    return line + _end_inputs(output, tokenizer)
  return write_tokenizer(tokenizer, output)
