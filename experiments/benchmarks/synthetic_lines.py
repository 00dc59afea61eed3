"""Lines of JSON of any size, drawn from the standard library's text.

Document k depends on the seed and k alone, so that what was read from prepared
data can be compared with what was written.
"""

import dataclasses
import functools
import json
import pathlib

import numpy as np

from moe_jax.data import SPLITS, PythonStdlibSource
from moe_jax.data.sources.python_stdlib import split_of

_FILE_BYTES = 2**28
_LONGEST = 6000  # largest number of characters of a document


@functools.cache
def _stdlib() -> str:
  texts = PythonStdlibSource().texts()
  return '\n'.join(text for split in SPLITS for text in texts.documents(split))


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents, each a piece of the standard library's text behind its number.

  Attributes:
    seed: Seed of the documents.
  """

  seed: int = 0

  def document(self, number: int) -> str:
    """The text of a document."""
    text = _stdlib()
    # Fibonacci hashing: numbers far apart, and no generator for each document.
    draw = (number + 1 + self.seed * 2**40) * 0x9E3779B97F4A7C15 % 2**64
    begin = (draw >> 20) % len(text)
    return f'{number}\n{text[begin : begin + draw % _LONGEST]}'

  def write(self, folder: pathlib.Path, size: int) -> np.ndarray:
    """Writes files of lines; returns which documents are for training, [D].

    Args:
      folder: Folder of the files, `00.jsonl` and so on.
      size: Number of bytes of all files together, about.
    """
    folder.mkdir(parents=True)
    training, written, count = [], 0, 0
    while written < size:
      with (folder / f'{count:03}.jsonl').open('w', encoding='utf-8') as out:
        begun = written
        while written < size and written - begun < _FILE_BYTES:
          text = self.document(len(training))
          written += out.write(json.dumps({'text': text}) + '\n')
          training.append(split_of(text) == 'train')
      count += 1
    return np.array(training)
