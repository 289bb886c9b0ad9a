"""The peers, where they are installed."""

import warnings

import pytest


@pytest.fixture(scope="session")
def peers():
  """torch, transformers and its logits processors."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what torch and transformers import
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers import LlamaForCausalLM  # noqa: F401  (imported lazily)
    from transformers.generation import logits_process
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # rows are small, and other workers have the other cores
  yield torch, transformers, logits_process
  torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def peer():
  """llama.cpp's C interface."""
  package = pytest.importorskip("llama_cpp")
  yield package.llama_cpp
  for file in (package._utils.outnull_file, package._utils.errnull_file):
    file.close()  # or a warning at exit
