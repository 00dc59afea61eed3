"""Published numbers: as printed, cited with their mark, or hidden."""

import dataclasses
import json
import re

import pytest

from experiments.study import claims

# These numbers were typed from the papers, not copied from the file.
PRINTED = {
  'shazeer2017/table6': {
    '(0.0, 0.0)': (39.8, 3.04, 3.01, 17.80),
    '(0.1, 0.1)': (35.6, 0.06, 0.05, 1.14),
    '(1.0, 1.0)': (35.7, 0.03, 0.02, 1.07),
  },
  'shazeer2017/table7': {'MoE-256': (35.7, 8.6, 272.9)},
  'shazeer2017/table5': {'En-Ko': (18.41, 16.62, -1.79)},
  'gshard2020/table3': {'512E 36L': (150, 43.7, 15.5, 11.0)},
  'switch2021/table1': {
    'T5-Base': (-1.731, 1600),
    'Switch CF 1.0': (-1.561, 62.8, 1000),
    'MoE CF 2.0': (-1.547, 68.7, 840),
  },
  'switch2021/scaling': {'64E': (60, 450, 7.5, 7)},
  'stmoe2022/table8': {'top-2, CF 1.25': (-1.375, -1.369)},
  'expert_choice2022/average11': {'8B-64E': (88.9, 90.3, 92.6)},
  'expert_choice2022/capped': {'hash (mod x)': (81.3, 0.1)},
  'lossfree2024/table2': {
    '1B loss-controlled': (9.56, 0.72),
    '1B loss-free': (9.50, 0.04),
  },
  'deepseekmoe2024/comparison_2b': {'DeepSeekMoE': (1.808, 54.8, 16.6)},
}


def test_numbers_are_as_printed():
  printed_values = {}
  for address, cell in claims.load().items():
    table, row, _ = address.rsplit('/', 2)
    printed_values.setdefault(table, {}).setdefault(row, []).append(cell.value)
  for table, rows in PRINTED.items():
    for row, values in rows.items():
      assert tuple(printed_values[table][row]) == values, f'{table}/{row}'


@pytest.mark.parametrize(
  ('address', 'citation'),
  [
    ('shazeer2017/table6/(0.0, 0.0)/max_over_mean', '17.8 (Table 6)'),
    ('gshard2020/table3/dense T(96L)/core_years', '~235.5 (Table 3)'),
    (
      'jacobs1991/table1/4 experts/mean_epochs',
      '1124 (Table 1, secondary source)',
    ),
    (
      'switch2021/scaling/64E/time_speedup',
      '7 (text; in words: one-seventh of the time)',
    ),
    ('hash2021/reddit/Hash/ppl', 'unverified, not shown'),
    # This is one cell of a table marked 'checked'.
    ('nllb2022/models/NLLB-200 MoE/F', 'unverified, not shown'),
    ('nllb2022/models/NLLB-200 MoE/E', '128 (configurations)'),
  ],
)
def test_cite_follows_the_mark(address, citation):
  assert claims.find(address).cite() == citation


def test_an_unverified_value_is_in_no_text():
  cells = claims.load().values()
  assert sum(cell.mark == 'unverified' for cell in cells) > 20
  for cell in cells:
    unsure = dataclasses.replace(cell, mark='unverified')
    for text in (unsure.cite(), str(unsure), repr(unsure), f'{[unsure]}'):
      assert str(cell.value) not in text.replace(cell.address, '')
    if cell.mark == 'unverified':
      assert not re.search(rf'(?<!\d){cell.value}(?!\d)', cell.note)


def test_every_cell_has_a_paper_and_a_place_of_its_own():
  cells = claims.load()
  assert all(address == cell.address for address, cell in cells.items())
  papers = json.loads(claims.CLAIMS.read_text(encoding='utf-8'))
  assert {address.split('/')[0] for address in cells} == set(papers)
  # No title or address may be copied from another paper.
  for key in ('title', 'url'):
    assert len({paper[key] for paper in papers.values()}) == len(papers)


@pytest.mark.parametrize(
  ('address', 'message'),
  [
    ('switch2021/table1/Switch CF 1/hours', "did you mean 'Switch CF 1.0'"),
    ('switch2021/table3/0.1x', r"have \['nlp', 'sd'\]"),
  ],
)
def test_find_names_what_exists(address, message):
  with pytest.raises(ValueError, match=message):
    claims.find(address)


GOOD = """{"p2020": {"title": "P", "url": "https://p", "year": 2020, "tables": {
  "t": {"table": "Table 1", "mark": "checked", "about": "tiny",
    "columns": {"ppl": ["ppl", "lower"], "size": ["M"]},
    "rows": {
      "a": [1.5, "<=30"],
      "b": [null, {"value": "~2", "unit": "B", "mark": "secondary"}]
}}}}}"""


@pytest.mark.parametrize(
  ('old', 'new', 'message'),
  [
    ('"checked"', '"check"', 'p2020/t/a/ppl.*did you mean .checked'),
    ('["M"]', '[]', 'p2020/t/a/size: no unit'),
    ('"lower"', '"less"', 'direction of p2020/t/a/ppl'),
    ('1.5', 'NaN', 'p2020/t/a/ppl: nan'),
    ('"<=30"', '"30 or so"', "p2020/t/a/size: '30 or so'"),
    ('"b":', '"a":', 'p2020/t/a stands twice'),
    ('"size":', '"ppl":', 'p2020/t/ppl stands twice'),
    ('1.5, ', '', 'p2020/t/a: .* for columns'),
    ('"unit": "B"', '"units": "B"', "p2020/t/b/size.*did you mean 'unit'"),
  ],
)
def test_a_broken_file_is_refused_by_its_cell(tmp_path, old, new, message):
  assert GOOD.count(old) == 1
  good, path = tmp_path / 'good.json', tmp_path / 'claims.json'
  good.write_text(GOOD)
  # The paper does not print b/ppl, so that there is no such cell.
  cells = claims.load(good)
  assert [*cells] == ['p2020/t/a/ppl', 'p2020/t/a/size', 'p2020/t/b/size']
  assert [c.better for c in cells.values()] == ['lower', None, None]
  assert cells['p2020/t/a/size'].relation == '<='
  path.write_text(GOOD.replace(old, new))
  with pytest.raises(ValueError, match=message):
    claims.load(path)
