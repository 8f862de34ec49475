# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#    https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What several processes of one conversion tell each other, by the client of `jax.distributed`."""

from collections.abc import Callable, Mapping
import itertools
import json
import time
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import errors

# Whoever clears up after a stop need not wait for JAX and Orbax.  pylint: disable=import-outside-toplevel

_NUMBERS = itertools.count()
_TIMEOUT_MS = 300_000  # As long as JAX waits for processes to connect.
_SECONDS_TO_SAY_SO = 3  # JAX aborts the others when the first process ends.
_REFUSAL = "refusal"  # Instead of the names of options.


def index_and_count() -> tuple[int, int]:
  """The index of this process, and how many there are."""
  import jax

  return jax.process_index(), jax.process_count()


def from_first(make: Callable[[], str], timeout_ms: int) -> str:
  """What the first process makes, in all processes, which call this in the same order."""
  import jax

  if jax.process_count() == 1:
    return make()
  key, client = _next()
  if jax.process_index() == 0:
    client.key_value_set(key, make())
  return client.blocking_key_value_get(key, timeout_ms)


def begin_alike[T](begin: Callable[[], T], given: Callable[[T], Mapping[str, Any]]) -> T:
  """What `begin` returns, if it does so in all processes, which were given the same, before any of them writes.

  Args:
    begin: begins; what it refuses, all refuse.
    given: what this process was given, by the names of options.

  Raises:
    ConversionError: `begin` refuses.
    OptionError: it does in another process, or a flag differs, or not all have come so far in five minutes.
  """
  import jax

  if jax.process_count() == 1:
    return begin()
  try:
    begun = begin()
  except errors.ConversionError as e:
    _from_all({_REFUSAL: str(e).rstrip(".")})
    raise
  everything = _from_all(values := given(begun))
  if refusals := [each[_REFUSAL] for each in everything if _REFUSAL in each]:
    raise errors.OptionError("--process_id", "no process that refuses", refusals[0], "Mend it, and start all again.")
  for name in values:
    if len(found := sorted({str(each[name]) for each in everything})) > 1:
      raise errors.OptionError(
          f"--{name}",
          "the same value in all processes",
          " and ".join(found),
          "Start all with the same options.",
      )
  return begun


def _from_all(said: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What all processes say, each of which calls this. If that is not all alike, the first one ends last."""
  import jax

  key, client = _next()
  client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(said, default=str))
  try:
    client.wait_at_barrier(key, _TIMEOUT_MS)
  except jax.errors.JaxRuntimeError as e:
    expected = f"all {jax.process_count()} processes to begin"
    raise errors.OptionError("--num_processes", expected, "one that does not", "See what it says, and start all.") from e
  texts = [text for _, text in client.key_value_dir_get(key)]
  if jax.process_index() == 0 and len(set(texts)) > 1:
    time.sleep(_SECONDS_TO_SAY_SO)
  return [json.loads(text) for text in texts]


def _next():
  """A key that is new, and the same in all processes; and the client."""
  from orbax.checkpoint._src.multihost import multihost

  return f"linen_nnx_converter/{next(_NUMBERS)}", multihost.get_jax_distributed_client()
