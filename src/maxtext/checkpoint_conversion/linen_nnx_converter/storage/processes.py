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


def from_first(make: Callable[[], str], timeout_ms: int) -> str:
  """What the first process makes, in all processes, which call this in the same order."""
  import jax

  if jax.process_count() == 1:
    return make()
  key, client = _next()
  if jax.process_index() == 0:
    client.key_value_set(key, make())
  return client.blocking_key_value_get(key, timeout_ms)


def check_alike(values: Mapping[str, Any]):
  """Checks that all processes were given the same, before any of them writes.

  Args:
    values: what this one was given, by the names of options.

  Raises:
    OptionError: in all processes, naming a flag that differs; or not all of them have come so far in five minutes.
  """
  import jax

  if jax.process_count() == 1:
    return
  key, client = _next()
  client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(values, default=str))
  try:
    client.wait_at_barrier(key, _TIMEOUT_MS)
  except jax.errors.JaxRuntimeError as e:
    expected = f"all {jax.process_count()} processes to begin"
    raise errors.OptionError("--num_processes", expected, "one that does not", "See what it says, and start all.") from e
  given = [json.loads(text) for _, text in client.key_value_dir_get(key)]
  for name in values:
    if len(found := sorted({str(each[name]) for each in given})) > 1:
      time.sleep(_SECONDS_TO_SAY_SO if jax.process_index() == 0 else 0)
      raise errors.OptionError(
          f"--{name}",
          "the same value in all processes",
          " and ".join(found),
          "Start all with the same options.",
      )


def _next():
  """A key that is new, and the same in all processes; and the client."""
  from orbax.checkpoint._src.multihost import multihost

  return f"linen_nnx_converter/{next(_NUMBERS)}", multihost.get_jax_distributed_client()
