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

SCHEMA = 1  # The version of the JSON document, which changes if a field is removed or changes its meaning.
_MOST_STATES = 8  # Shown of an optimizer.


def lines(found: inspection.Inspection, *, tree: bool = False) -> Iterator[str]:
  """The answer for a person: a title and what is said under it."""
  yield errors.escaped(found.path)
  for title, said in facts(found):
    yield errors.escaped(f"  {title:<11} {said}")
  if tree:
    yield from map(errors.escaped, folding.fold(f"  {path}  {said}" for path, said in found.leaves.items()))


def as_json(found: inspection.Inspection) -> dict[str, Any]:
  """The same as a JSON document."""
  amounts = [{"part": part, "dtype": dtype} | dataclasses.asdict(it) for (part, dtype), it in found.amounts.items()]
  return dataclasses.asdict(dataclasses.replace(found, amounts={})) | {"amounts": amounts}


def facts(found: inspection.Inspection) -> Iterator[tuple[str, str]]:
  """The titles, each with what is said."""
  yield from _told(found)
  if found.model:
    yield from found.model.lines()
  yield from (("problem", problem) for problem in found.problems)


def _told(found) -> Iterator[tuple[str, str]]:
  """What its metadata say."""
  item = found.item and f"{found.item}; MaxText looks for items, but for emergency checkpoints"
  for title, said in (
      ("layout", found.layout),
      ("item", item),
      ("step", found.step),
      ("beside it", ", ".join(found.items)),
  ):
    if said not in (None, ""):
      yield title, str(said)
  for part in sorted(
      dict.fromkeys(part for part, _ in found.amounts if part != "step"), key=lambda part: part != "params"
  ):
    yield part, _amount({dtype: amount for (of, dtype), amount in found.amounts.items() if of == part})
  if found.optimizer_states:
    yield "optimizer", _optimizer(found)
  if found.rng_leaves:
    yield "rngs", f"{folding.count(found.rng_leaves, 'leaf', 'leaves')}: {', '.join(found.rng_streams)}"
  yield from (("layers", layers) for layers in found.layers)
  if found.families:
    yield "family", " or ".join(found.families)
  if stored := found.storage:
    chunks, files = folding.count(stored.chunks, "chunk"), folding.count(stored.files, "file")
    yield "storage", f"{stored.kind}: {chunks} in {files}; {folding.size(stored.nbytes)}"
  is_state = any(part == "step" for part, _ in found.amounts)
  yield from _readers(found.readers, "as far as the tree tells" if is_state else "by load_parameters_path")
  if found.record:
    yield "made from", _origin(found.record)


def _amount(by_dtype) -> str:
  """The leaves of a part, and its elements of each dtype."""
  leaves, nbytes = (sum(getattr(amount, name) for amount in by_dtype.values()) for name in ("leaves", "nbytes"))
  elements = ", ".join(f"{amount.elements:,} {dtype}" for dtype, amount in by_dtype.items())
  return f"{folding.count(leaves, 'leaf', 'leaves')}: {elements}; {folding.size(nbytes)}"


def _optimizer(found) -> str:
  """Its names, and the fields of its states, as `0/{count, mu, nu}`."""
  states = [f"{path}{path and '/'}{{{', '.join(names)}}}" for path, names in found.optimizer_states.items()]
  more = [f"… ({len(states)} in all)"] if len(states) > _MOST_STATES else []
  return f"{', '.join(found.optimizer) or 'of an unknown kind'}: {', '.join(states[:_MOST_STATES] + more)}"


def _readers(readers, how) -> Iterator[tuple[str, str]]:
  """Who reads it as it is, and for the others the command, or why there is none."""
  named = lambda some: ", ".join(f"{reader.release} ({reader.trainer})" for reader in some)
  if as_it_is := [reader for reader in readers if reader.as_it_is]:
    yield "read by", f"{named(as_it_is)}, {how}"
  yield from ((f"{reader.release} {reader.trainer}", reader.command) for reader in readers if reader.command)
  for refusal in dict.fromkeys(reader.refusal for reader in readers if reader.refusal):
    yield "not for", f"{named(reader for reader in readers if reader.refusal == refusal)}: {refusal}"


def _origin(record) -> str:
  """What the converter's record says, whichever version wrote it."""
  versions, dropped, casts = (record.get(name) or {} for name in ("versions", "dropped", "casts"))
  version = versions.get("linen_nnx_converter", "") if isinstance(versions, dict) else ""
  said = [
      f"{record.get('source')} ({record.get('source_layout')})",
      f"by linen_nnx_converter {version}".rstrip(),
      *([f"left out {len(dropped)}"] if isinstance(dropped, dict) and dropped else ()),
      *(f"cast {number} from {dtypes}" for dtypes, number in (casts.items() if isinstance(casts, dict) else ())),
      "verified" if record.get("verified") else "not verified",
  ]
  return ", ".join(said)
