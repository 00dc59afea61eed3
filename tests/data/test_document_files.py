"""Documents in files of every format, whole, in parts and damaged."""

import bz2
import gzip
import json
import lzma

import pytest

from moe_jax.data import document_files
from moe_jax.data.document_files import LEAST_BYTES, MOST_BYTES

TEXTS = ['first\n\nwith an empty line', '', 'zweite „Zeile“', 'x' * 300]
LINES = ''.join(json.dumps({'body': text, 'n': 3}) + '\n' for text in TEXTS)
arrow = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')


def documents(path, field='text'):
  for span in document_files.spans(path):
    yield from document_files.read(span, field)


def zst(raw):
  return arrow.compress(raw, 'zstd', asbytes=True)


COMPRESSORS = {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress}
COMPRESSORS |= {'.xz': lzma.compress, '.zst': zst}


@pytest.mark.parametrize('suffix', COMPRESSORS)
def test_lines_and_short_text(suffix, tmp_path):
  compress = COMPRESSORS[suffix]
  path = tmp_path / f'a.jsonl{suffix}'
  path.write_bytes(compress(f'\n{LINES}'.encode()))
  assert list(documents(path, 'body')) == TEXTS
  # A short text is one document; streams one after another are one.
  path = tmp_path / f'a.txt{suffix}'
  path.write_bytes(compress('ä\r\n'.encode()) + compress(b'\r\nb'))
  assert list(documents(path)) == ['ä\r\n\r\nb']
  assert {'', *document_files.CODECS} == {*COMPRESSORS}


def write_parquet(path, texts, rows=2):
  table = arrow.table({'n': list(range(len(texts))), 'body': texts})
  parquet.write_table(table, path, row_group_size=rows)


def test_rows_of_parquet(tmp_path):
  write_parquet(tmp_path / 'a.parquet', TEXTS)
  assert list(documents(tmp_path / 'a.parquet', 'body')) == TEXTS
  spans = document_files.spans(tmp_path / 'a.parquet', 1)
  assert [(s.begin, s.end) for s in spans] == [(0, 1), (1, 2)]
  texts = list(document_files.read(spans[1], 'body'))
  assert texts == TEXTS[2:]


def long_text():
  """Returns lines and a few empty ones, then a huge line and a short one."""
  lines = [f'{i} ' + 'ä' * (i % 50) + '\n' * (1 + (i % 40 == 0))
           for i in range(20_000)]  # fmt: skip
  return ''.join(lines) + 'ö' * MOST_BYTES + '\nend'


def test_long_text_is_cut_at_empty_lines_then_lines_then_anywhere(tmp_path):
  text = long_text()
  (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(text.encode(), 1))
  pieces = list(documents(tmp_path / 'a.txt.gz'))
  assert ''.join(pieces) == text
  sizes = [len(document.encode()) for document in pieces]
  assert all(LEAST_BYTES <= size <= MOST_BYTES + 3 for size in sizes[:-1])
  at_empty_lines = [d.endswith('\n\n') for d in pieces]
  assert all(at_empty_lines[:10]) and len(pieces) > 12
  longest = [d for d, size in zip(pieces, sizes) if size >= MOST_BYTES]
  assert longest and all(d.endswith('ö') for d in longest)


def test_parts_of_long_text_are_the_text(tmp_path, monkeypatch):
  monkeypatch.setattr(document_files, 'WHOLE_BYTES', 1000)
  path, text = tmp_path / 'a.txt', long_text()
  path.write_bytes(text.encode())
  spans = document_files.spans(path, 2**18 + 1, extra_cuts=[777])
  assert len(spans) == -(-path.stat().st_size // (2**18 + 1)) + 1
  span_texts = [list(document_files.read(span)) for span in spans]
  assert ''.join(text for texts in span_texts for text in texts) == text
  assert span_texts[0] and span_texts[0][0].endswith('\n')


@pytest.mark.parametrize('max_bytes', [1, 17, 64, 400])
def test_parts_of_lines_have_every_line_once(max_bytes, tmp_path):
  path = tmp_path / 'a.jsonl'
  for i in range(20):
    texts = [f'{i}' * (j * i % 13) for j in range(i)]
    lines = [json.dumps({'text': text}) for text in texts]
    path.write_text('\n'.join(lines) + '\n' * (i % 3))
    spans = document_files.spans(path, max_bytes)
    assert [d for s in spans for d in document_files.read(s)] == texts


# Damaged files follow.


def assert_refused(path, content, *phrases, field='body'):
  path.write_bytes(content)
  with pytest.raises(ValueError) as error:
    for span in document_files.spans(path, 200):
      for document in document_files.read(span, field):
        assert isinstance(document, str)
  for phrase in (path.name, *phrases):
    assert phrase in str(error.value)


@pytest.mark.parametrize(
  ('line', 'phrase'),
  [
    (b'[3]', "line 9 is no object with a text under the key 'body', but a li"),
    (b'{"n": 1, "m": 2}', "line 9 has no key 'body'; its keys: 'm', 'n'; cho"),
    (b'{"body": "\\ud800"}', 'line 9'),
    (b'\xff', 'line 9 is not UTF-8'),
  ],
)
def test_a_bad_line_is_named_in_every_part(line, phrase, tmp_path):
  content = (LINES * 2).encode() + line + b'\n' + LINES.encode()
  assert_refused(tmp_path / 'a.jsonl', content, phrase)
  assert_refused(tmp_path / 'a.jsonl.bz2', bz2.compress(content), phrase)


@pytest.mark.parametrize('suffix', document_files.CODECS)
def test_a_cut_stream_is_named_with_its_line(suffix, tmp_path):
  text = ''.join(json.dumps({'body': f'{i * 7**9}'}) + '\n' for i in range(900))
  compressed = COMPRESSORS[suffix](text.encode())
  path = tmp_path / f'a.jsonl{suffix}'
  assert_refused(path, compressed[:-20], 'damaged after line')
  assert_refused(path, b'no stream of it', 'damaged after')


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
  assert_refused(tmp_path / 'a.txt', b'a\nb\n\xff', 'not UTF-8 in line 3')
  assert_refused(tmp_path / 'a.txt.gz', gzip.compress(b'a\n\xff'), 'in line 2')


def test_bad_parquet_is_named_with_its_row(tmp_path):
  path = tmp_path / 'a.parquet'
  assert_refused(path, b'PAR1 no', 'is no parquet file')
  write_parquet(path, ['a', 'b', None])
  assert_refused(path, path.read_bytes(), 'row 3 has no text')
  assert_refused(
    path, path.read_bytes(), "no column 'text'; it has", field='text'
  )
  assert_refused(path, path.read_bytes(), "'n'", 'int64, no texts', field='n')
  write_parquet(path, [f'{i}' * 99 for i in range(400)], rows=100)
  damaged = bytearray(path.read_bytes())
  middle = len(damaged) // 2
  damaged[middle : middle + 200] = bytes(200)
  assert_refused(path, bytes(damaged), 'damaged after row')


def test_a_line_that_fits_no_memory_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(document_files, 'MOST_LINE_BYTES', 100)
  line = json.dumps({'body': 'a' * 500}).encode()
  for before in (b'', b'{}\n' * 40):
    assert_refused(tmp_path / 'a.jsonl', before + line, 'more than 100 bytes')
