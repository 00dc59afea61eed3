"""Decoders of four domains of text, for studies of what experts specialise in.

The domains are parts of the embedded corpus: tables of characters, and code
about networks, about concurrency and of tools for developers. Batches have
equal shares of all. They are closer to each other than the papers' domains,
web text, code, mathematics and languages, are.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.study import byte_models
from experiments.study.tasks import Task
from moe_jax.configs import base
from moe_jax.data import PythonStdlibSource

# Modules of the standard library, by domain; each domain has validation files.
DOMAINS = {
  'concurrency': 'asyncio,concurrent,multiprocessing,queue,sched,selectors,'
  'subprocess,threading',
  'network': 'email,ftplib,html,http,imaplib,poplib,smtplib,socket,'
  'socketserver,ssl,urllib,xmlrpc',
  'tables': 'encodings',
  'tools': 'ast,bdb,cProfile,dis,doctest,inspect,optparse,pdb,profile,pstats,'
  'pydoc,timeit,tokenize,trace,unittest',
}
TASKS = {
  'domains': Task({}, 'four parts of the Python standard library, bytes')
}


def decoder(steps: int, **sizes: Any) -> ConfigDict:
  """Config of a causal model of all domains, with rows of 128 bytes.

  Args:
    steps: Length of the run.
    **sizes: Other arguments of `byte_models.decoder`.
  """
  config = byte_models.decoder(steps, **sizes)
  config.batch_size = 16
  config.data.seq_len = 128
  mixture = config.data.mixture
  for name, modules in DOMAINS.items():
    mixture.sources[name] = base.source(PythonStdlibSource(modules=modules))
  mixture.rule = 'given'
  return config
