"""Writes the text of every config again."""

from tests import golden

for name in golden.NAMES:
  (golden.FOLDER / f'{name}.json').write_text(golden.dump(name))
