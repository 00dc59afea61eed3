"""Where studies find `Start`."""

from experiments.study.parts import Start as Start
