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

"""One thing to measure, in a process of its own, which prints what it took as JSON on its last line.

usage: measured_process.py start
       measured_process.py convert FLAGS…
       measured_process.py together COUNT FLAGS…
       measured_process.py inspect SOURCE
       measured_process.py compare A B FLAGS…
       measured_process.py straightforward SOURCE TARGET OPTIONS
       measured_process.py copy SOURCE TARGET
       measured_process.py decode SOURCE
       measured_process.py encode SOURCE TARGET
       measured_process.py make TARGET MODULE OPTIONS

OPTIONS are JSON: of `convert_linen_to_nnx`, or of the `save` of a module of this folder.
"""

import asyncio
import importlib
import itertools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

_CONVERTER = "maxtext.checkpoint_conversion.linen_nnx_converter"
_AT_ONCE, _LAYERS_AT_ONCE = 2, 8  # Chunks, and layers of one: about what the converter has under way.


def start():
  """What a command that decodes does before it reads a byte of a checkpoint: it tunes its allocator, and imports."""
  importlib.import_module(f"{_CONVERTER}.command.streams").tune_malloc(os.path.basename(__file__))
  _import()
  return lambda: None


def _import():
  importlib.import_module(f"{_CONVERTER}.api")


def convert(*arguments: str):
  """The converter's command."""
  start()
  command = importlib.import_module(f"{_CONVERTER}.__main__")

  def run():
    command.set_up()  # Not `console_main`, which would convert in a child process.
    if code := command.main(arguments):
      sys.exit(code)

  return run


def together(count: str, *flags: str):
  """The converter's command in several processes, whose CPU time and memory are added up."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    shared = [f"--coordinator_address=localhost:{free.getsockname()[1]}", f"--num_processes={count}"]
  command = [sys.executable, __file__, "convert", *flags, *shared]
  processes = [
      subprocess.Popen([*command, f"--process_id={number}"], stdout=subprocess.PIPE, text=True)
      for number in range(int(count))
  ]

  def run():
    lines = [process.communicate()[0].splitlines() for process in processes]
    if any(process.returncode for process in processes):
      sys.exit(next(process.returncode for process in processes if process.returncode))
    told = [json.loads(some[-1]) for some in lines]
    print(lines[0][-2])
    begin, end = max(each["began"] for each in told), max(each["began"] + each["work"] for each in told)
    return {name: sum(each[name] for each in told) for name in told[0]} | {"began": begin, "work": end - begin}

  return run


def inspect(source: str):
  """The inspector's command."""
  _import()
  command = importlib.import_module("maxtext.checkpoint_conversion.linen_nnx_inspector.__main__")

  def run():
    if code := command.main(["inspect", source]):
      sys.exit(code)

  return run


def compare(*arguments: str):
  """The comparator's command."""
  start()
  command = importlib.import_module("maxtext.checkpoint_conversion.linen_nnx_comparator.__main__")

  def run():
    if code := command.main(["compare", *arguments]):
      sys.exit(code)

  return run


def straightforward(source: str, target: str, options: str):
  """Restores all, transforms it with NumPy, saves all; `chunk_byte_size` among the options is Orbax's."""
  _import()
  converter = importlib.import_module(_CONVERTER)
  ocp = importlib.import_module("orbax.checkpoint")

  jax, chosen = importlib.import_module("jax"), json.loads(options)
  save_args = ocp.SaveArgs(chunk_byte_size=chosen.pop("chunk_byte_size", None))

  def run():
    tree = converter.load_checkpoint(source)
    is_nnx = converter.detect_format(tree) == "nnx"
    transform = converter.convert_nnx_to_linen if is_nnx else converter.convert_linen_to_nnx
    converted = transform(tree, **chosen)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as checkpointer:
      arguments = ocp.args.PyTreeSave(converted, save_args=jax.tree.map(lambda _: save_args, converted))
      checkpointer.save(target, args=arguments)

  return run


def copy(source: str, target: str):
  """Copies all files of a folder as they are, one of them or both in remote storage."""
  start()
  fsspec = importlib.import_module("fsspec")

  def run():
    system = fsspec.filesystem("gs")
    way = system.put if "://" not in source else system.get if "://" not in target else system.copy
    way(source, target, recursive=True)

  return run


def decode(source: str):
  """Reads every array, two at a time, and drops it: what slicing cannot do without."""
  start()
  checkpoint = _opened(source)

  async def read(path, gate):
    async with gate:
      await (await checkpoint.open(path)).read()

  async def run():
    gate = asyncio.Semaphore(_AT_ONCE)
    await asyncio.gather(*(read(path, gate) for path in checkpoint.stored))

  return lambda: asyncio.run(run())


def encode(source: str, target: str):
  """Writes an array for each layer of a source, always those of its first stack: the rest of what slicing takes."""
  start()
  ts = importlib.import_module("tensorstore")
  checkpoint = _opened(source)
  stacks = [path for path, leaf in checkpoint.stored.items() if len(leaf.shape) == 3]
  shape, document = checkpoint.stored[stacks[0]].shape, checkpoint.stored[stacks[0]].document
  layer_shape = shape[:1] + shape[2:]
  restated = json.loads(json.dumps(document).replace(json.dumps(shape), json.dumps(layer_shape)))
  kvstore = {"driver": "ocdbt", "base": f"file://{target}/"}
  context = ts.Context()

  async def write_layer(number, layer, data, transaction):
    spec = {"driver": "zarr3", "kvstore": kvstore | {"path": f"{number}.{layer}/"}, "metadata": restated}
    array = await ts.open(spec, create=True, context=context, transaction=transaction)
    await array.write(data[:, layer], can_reference_source_data_indefinitely=True)

  async def write(number, data, gate):
    async with gate:
      for layers in itertools.batched(range(shape[1]), _LAYERS_AT_ONCE):
        transaction = ts.Transaction(atomic=True)
        await asyncio.gather(*(write_layer(number, layer, data, transaction) for layer in layers))
        await transaction.commit_async()

  async def run():
    data = await (await checkpoint.open(stacks[0])).read()
    gate = asyncio.Semaphore(_AT_ONCE)
    await asyncio.gather(*(write(number, data, gate) for number in range(len(stacks))))

  return lambda: asyncio.run(run())


def _opened(source):
  reader = importlib.import_module(f"{_CONVERTER}.storage.reader")
  return reader.Checkpoint(importlib.import_module("etils.epath").Path(source))


def make(target: str, module: str, options: str):
  """Makes a checkpoint."""
  data = importlib.import_module(module)
  return lambda: data.save(pathlib.Path(target), **json.loads(options))


def usage() -> dict[str, float]:
  """This process's CPU seconds, the peak of its resident memory, and what it read and wrote, in bytes."""
  status = pathlib.Path("/proc/self/status").read_text()
  counts = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
  return {
      "cpu": time.process_time(),
      # `ru_maxrss` may be the parent's.
      "rss": int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024,
      "read": int(counts["rchar"]),
      "written": int(counts["wchar"]),
      "disk_read": int(counts["read_bytes"]),
  }


def main(argv):
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # As the command does, before it imports JAX.
  jobs = (start, convert, together, inspect, compare, straightforward, copy, decode, encode, make)
  run = {job.__name__: job for job in jobs}[argv[1]](*argv[2:])
  begin = time.monotonic()
  told = run()  # Of several processes, what these took.
  print(json.dumps({"began": begin, "work": time.monotonic() - begin} | usage() | (told or {})))


if __name__ == "__main__":
  main(sys.argv)
