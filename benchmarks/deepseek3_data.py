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


"""Makes the checkpoint of DeepSeek-V3 671B with adamw that MaxText's Linen trainer would write on 512 hosts: 8.05 TB.

Names, shapes, dtypes, chunks, stores and data files are real, and so is where each value lies and how long it is. The
bytes are not: what a host has written is hard links to the data files of one host, and a weight and its moments share
their values. So it takes 3.1 GB.
"""

import asyncio
from collections.abc import Iterator
import json
import math
import os
import pathlib
import shutil
from typing import Any

from etils import epath
import numpy as np
from orbax.checkpoint._src.serialization import tensorstore_utils
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import target_leaf

HOSTS = 512
_EMBED = 7168
_DENSE_LAYERS, _MOE_LAYERS = 3, 58
_LARGE = 2**28  # Elements of chunks that are written one by one: 1 GiB.
# The shapes of MaxText 0.2.4's deepseek3-671b, which are float32 by default, those of layers without the layer axis.
_OUTSIDE = {
    "decoder/decoder_norm/scale": (_EMBED,),
    "decoder/logits_dense/kernel": (_EMBED, 129280),
    "token_embedder/embedding": (129280, _EMBED),
}
_ATTENTION = {
    "post_self_attention_layer_norm/scale": (_EMBED,),
    "pre_self_attention_layer_norm/scale": (_EMBED,),
    "self_attention/kv_norm/scale": (512,),
    "self_attention/out/kernel": (128, 128, _EMBED),
    "self_attention/q_norm/scale": (1536,),
    "self_attention/wkv_a/kernel": (_EMBED, 576),
    "self_attention/wkv_b/kernel": (512, 128, 256),
    "self_attention/wq_a/kernel": (_EMBED, 1536),
    "self_attention/wq_b/kernel": (1536, 128, 192),
}
_DENSE = {
    "mlp/wi_0/kernel": (_EMBED, 18432),
    "mlp/wi_1/kernel": (_EMBED, 18432),
    "mlp/wo/kernel": (18432, _EMBED),
}
_MOE = {
    "DeepSeekMoeBlock_0/MoeBlock_0/gate/bias": (256,),
    "DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel": (_EMBED, 256),
    "DeepSeekMoeBlock_0/MoeBlock_0/wi_0": (256, _EMBED, 2048),
    "DeepSeekMoeBlock_0/MoeBlock_0/wi_1": (256, _EMBED, 2048),
    "DeepSeekMoeBlock_0/MoeBlock_0/wo": (256, 2048, _EMBED),
    "DeepSeekMoeBlock_0/shared_experts/wi_0/kernel": (_EMBED, 2048),
    "DeepSeekMoeBlock_0/shared_experts/wi_1/kernel": (_EMBED, 2048),
    "DeepSeekMoeBlock_0/shared_experts/wo/kernel": (2048, _EMBED),
}
_AS_ORBAX = {"store_data_equal_to_fill_value": True}
_TREES = "params", "opt_state/0/mu", "opt_state/0/nu"
_COUNTS = "opt_state/0/count", "opt_state/2/count", "step"


def save(folder: pathlib.Path):
  """Saves the train state, scanned; each host writes one of 512 chunks of nearly every array."""
  leaves: dict[tuple[str, ...], Any] = {leaf.path: leaf for leaf in map(_leaf, *zip(*_arrays()))}
  state = abstract_state.AbstractState({**leaves, ("opt_state", "1"): None}, frozenset({("opt_state",)}))
  orbax_writer.save(
      epath.Path(folder),
      {"": orbax_writer.Pytree(state, _Hosts(list(leaves.values())))},
      form=storage_form.StorageForm(use_ocdbt=True, use_zarr3=True),
      before_commit=lambda _: None,
  )


def _arrays() -> Iterator[tuple[str, tuple[int, ...], str]]:
  """The name, shape and dtype of each array."""
  weights = dict(_OUTSIDE)
  for stack, layers, shapes in (("dense_layers", _DENSE_LAYERS, _DENSE), ("moe_layers", _MOE_LAYERS, _MOE)):
    for name, (first, *others) in (_ATTENTION | shapes).items():
      weights[f"decoder/{stack}/{name}"] = (first, layers, *others)
  for tree in _TREES:
    yield from ((f"{tree}/params/{name}", shape, "float32") for name, shape in weights.items())
  yield from ((name, (), "int32") for name in _COUNTS)


def _leaf(name, shape, dtype) -> target_leaf.ArrayLeaf:
  axis = _sharded_axis(shape)
  chunk = tuple(size // HOSTS if at == axis else size for at, size in enumerate(shape))
  is_replicated = axis is None or name.endswith("/scale")
  spec = [] if is_replicated else ["fsdp" if at == axis else None for at in range(len(shape))]
  mesh = {"shape": [HOSTS], "axis_names": ["fsdp"], "device_mesh": {"mesh": [{"id": host} for host in range(HOSTS)]}}
  sharding = json.dumps({"sharding_type": "NamedSharding", **mesh, "partition_spec": spec})
  return target_leaf.ArrayLeaf(tuple(name.split("/")), shape, np.dtype(dtype), chunk, chunk, sharding, None, {}, False)


def _sharded_axis(shape) -> int | None:
  """The axis that MaxText shards over 512 devices; else the one that Orbax lets as many replicas divide up."""
  axes = [axis for axis, size in enumerate(shape) if size % HOSTS == 0]
  return shape.index(_EMBED) if _EMBED in shape else next(iter(axes), None)


class _Hosts:
  """Writes the stores of all hosts, which Orbax merges."""

  def __init__(self, leaves: list[target_leaf.ArrayLeaf]):
    self._leaves = leaves

  async def stream(self, stores, items):
    """Nothing is streamed."""

  async def put_encoded(self, items: epath.Path):
    values, context = items / "values", ocdbt_index.new_context()
    await _write_values({(leaf.chunk_shape, str(leaf.dtype)) for leaf in self._leaves}, values, context)
    for host in range(HOSTS):
      await self._write_store(items / f"ocdbt.process_{host}", host, values, context)
    shutil.rmtree(values)

  async def _write_store(self, store, host, values, context):
    """Makes a host's store refer to its links to the values."""
    (store / "d").mkdir(parents=True)
    for file in (values / "d").iterdir():
      os.link(file, store / "d" / file.name)
    manifest = ocdbt_index.spec(values, use_ocdbt=True)["base"]
    old = await ts.KvStore.open(ocdbt_index.spec(store, use_ocdbt=True) | {"manifest": manifest}, context=context)
    transaction = ts.Transaction(atomic=True)
    new = (await ts.KvStore.open(ocdbt_index.writable_spec(store), context=context)).with_transaction(transaction)
    only = ts.KvStore.KeyRange("", "\0")  # The empty key, relative to a store that is opened at a key.
    work = []
    for leaf in self._leaves:
      name, axis = ".".join(leaf.path), _sharded_axis(leaf.shape)
      if host == 0:
        place = ocdbt_index.writable_spec(store) | {"path": f"{name}/"}
        work.append(_open(leaf.shape, leaf.chunk_shape, leaf.dtype, place, context, transaction))
      if host == 0 or axis is not None:
        value = old / _chunk_key(_value_name(leaf.chunk_shape, leaf.dtype), len(leaf.shape))
        chunk = new / _chunk_key(name, len(leaf.shape), axis, host)
        work.append(value.experimental_copy_range_to(chunk, source_range=only))
    await asyncio.gather(*work)
    await transaction.commit_async()


async def _write_values(kinds, folder, context):
  """Writes an array of normally distributed weights, in a single chunk, for each shape and dtype of chunks."""
  numbers = 0.02 * np.random.default_rng(0).standard_normal(max(math.prod(shape) for shape, _ in kinds), np.float32)
  place = ocdbt_index.writable_spec(folder)
  is_large = lambda kind: math.prod(kind[0]) >= _LARGE
  for some in ([kind for kind in kinds if not is_large(kind)], *([kind] for kind in kinds if is_large(kind))):
    transaction = ts.Transaction(atomic=True)
    for shape, dtype in some:
      name = {"path": f"{_value_name(shape, dtype)}/"}
      array = await _open(shape, shape, dtype, place | name, context, transaction)
      data = numbers[: math.prod(shape)].reshape(shape).astype(dtype, copy=False)
      await array.write(data, can_reference_source_data_indefinitely=True)
    await transaction.commit_async()


async def _open(shape, chunk_shape, dtype, place, context, transaction) -> ts.TensorStore:
  """Makes an array as Orbax does."""
  metadata = tensorstore_utils.build_zarr_shard_and_chunk_metadata(
      global_shape=shape, shard_shape=chunk_shape, chunk_shape=chunk_shape, use_zarr3=True
  )
  spec = {"driver": "zarr3", "kvstore": place, "dtype": str(dtype), "metadata": metadata} | _AS_ORBAX
  return await ts.open(spec, create=True, context=context, transaction=transaction)


def _value_name(shape, dtype) -> str:
  return f"{dtype}.{'.'.join(map(str, shape))}"


def _chunk_key(name, rank, axis=None, place=0) -> str:
  return "/".join((name, "c", *(str(place if at == axis else 0) for at in range(rank))))
