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

"""What was found of a checkpoint, for a person and as JSON."""

from collections.abc import Iterator
import dataclasses
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import folding
from maxtext.checkpoint_conversion.linen_nnx_inspector import inspection

SCHEMA = 1  # The version of the JSON document: a field that goes, or means something else, is another one.


def lines(found: inspection.Inspection, *, tree: bool = False) -> Iterator[str]:
  """The answer for a person: a title and what is said under it."""
  yield errors.escaped(found.path)
  for title, said in (*_facts(found), *(("problem", problem) for problem in found.problems)):
    yield errors.escaped(f"  {title:<10} {said}")
  if tree:
    yield from map(errors.escaped, folding.fold(f"  {path}  {said}" for path, said in found.leaves.items()))


def as_json(found: inspection.Inspection) -> dict[str, Any]:
  """The same as a JSON document."""
  amounts = [{"part": part, "dtype": dtype} | dataclasses.asdict(it) for (part, dtype), it in found.amounts.items()]
  return dataclasses.asdict(dataclasses.replace(found, amounts={})) | {"amounts": amounts}


def _facts(found) -> Iterator[tuple[str, str]]:
  """The titles, each with what is said."""
  for title, said in (("layout", found.layout), ("step", found.step), ("beside it", ", ".join(found.items))):
    if said not in (None, ""):
      yield title, str(said)
  for part in dict.fromkeys(part for part, _ in found.amounts if part != "step"):
    yield part, _amount({dtype: amount for (of, dtype), amount in found.amounts.items() if of == part})
  if found.rng_leaves:
    yield "rngs", f"{found.rng_leaves:,} leaves"
  yield from (("layers", layers) for layers in found.layers)
  for title, said in (("moments", found.optimizer), ("storage", found.storage)):
    if said is not None:
      yield title, said
  if readers := [f"{reader.release} ({reader.trainer})" for reader in found.readers if reader.as_it_is]:
    how = "as far as the tree tells" if any(part == "step" for part, _ in found.amounts) else "by load_parameters_path"
    yield "read by", f"{', '.join(readers)}, {how}"
  yield from ((reader.release, f"{reader.trainer}: {_way(reader)}") for reader in found.readers if not reader.as_it_is)
  if found.record:
    yield "made from", _origin(found.record)


def _amount(by_dtype) -> str:
  """The leaves of a part, and its elements of each dtype."""
  leaves, nbytes = (sum(getattr(amount, name) for amount in by_dtype.values()) for name in ("leaves", "nbytes"))
  elements = ", ".join(f"{amount.elements:,} {dtype}" for dtype, amount in by_dtype.items())
  return f"{leaves:,} leaves: {elements}; {nbytes / 2**20:,.1f} MiB"


def _way(reader) -> str:
  return reader.command or f"cannot be converted for it: {reader.refusal}"


def _origin(record) -> str:
  """What the converter's record says, of what any version of it wrote."""
  how = "verified" if record.get("verified") else "not verified"
  return f"{record.get('source')} ({record.get('source_layout')}), {how}"
