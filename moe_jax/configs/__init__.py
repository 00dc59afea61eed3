"""Configs by name: `from moe_jax.configs import tiny_switch`.

Their files stand in `configs/` at the root of the repository, where `base.py`
has the defaults and the others change some of them. An installed package has
copies of these files in this folder.
"""

import pathlib
from typing import TYPE_CHECKING, Any

_OWN = pathlib.Path(__file__).parent
FOLDER = _OWN if (_OWN / 'base.py').is_file() else _OWN.parents[1] / 'configs'
__path__ = [str(FOLDER)]

if TYPE_CHECKING:

  def __getattr__(name: str) -> Any:  # the modules in `FOLDER`
    ...
