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

"""Google Cloud Storage on loopback: an emulator that counts what it is asked for, and fails when it is told to."""

import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
from http import server as http_server
import json
import logging
import os
import re
import socket
import threading
import time
from typing import Any
from unittest import mock
from urllib import parse

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

_OBJECT = re.compile(r"/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)(?P<rest>/.*)?\Z")
_KINDS = LIST, BUCKET, STAT, READ, UPLOAD, COPY, DELETE = "list", "bucket", "stat", "read", "upload", "copy", "delete"
_PAGE = 1000  # Names that a list has at most.
CLOSED = 0  # The status of a failure without any answer.


@dataclasses.dataclass
class Count:
  """What was asked for.

  Attributes:
    requests: their numbers by kind.
    nbytes: the bytes that were read, uploaded, and copied within the store, by kind.
    absent: the number of requests for what there is not.
    most_at_once: the most requests that were under way together.
    names: the kind and the object of each request.
  """

  requests: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  nbytes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  absent: int = 0
  most_at_once: int = 0
  names: list[tuple[str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Failure:
  """Which requests of a kind fail: after the first `after` ones, `times` of them."""

  kind: str
  after: int = 0
  times: float = float("inf")
  status: int = 503
  name: str = ""


class _Server(http_server.ThreadingHTTPServer):
  request_queue_size = 128

  def handle_error(self, request, client_address):
    """Says nothing of clients that hang up: gcsfs asks for a file and for a folder, and takes the first answer."""


class Cloud:
  """A server with one bucket.

  Attributes:
    storage: the emulator's.
    seconds: how long each request takes at least, as one over a network does.
    count: what was asked for since `counted` began.
    failure: which requests fail.
  """

  def __init__(self, bucket: str = "bucket", seconds: float = 0.0):
    self.storage, self.seconds = Storage(use_memory_fs=True), seconds
    self.count, self.failure = Count(), None
    self.lock, self._under_way = threading.RLock(), 0
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # It has an error for whatever is not there.
    buckets.create_bucket(bucket, self.storage)
    self._httpd = _Server(("localhost", 0), functools.partial(_Handler, self, self.storage))
    self.address = f"http://localhost:{self._httpd.server_port}"

  @contextlib.contextmanager
  def serving(self) -> Iterator["Cloud"]:
    """Serves, as what the clients of this process take for Google's."""
    environment = {
        "STORAGE_EMULATOR_HOST": self.address,
        "TENSORSTORE_GCS_HTTP_URL": self.address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # It asks Google itself for the kind of the bucket.
    }
    thread = threading.Thread(target=self._httpd.serve_forever, daemon=True)
    thread.start()
    try:
      with mock.patch.dict(os.environ, environment):
        yield self
    finally:
      self._httpd.shutdown()
      self._httpd.server_close()
      thread.join()

  @contextlib.contextmanager
  def counted(self) -> Iterator[Count]:
    """Counts anew."""
    self.count = Count()
    yield self.count

  @contextlib.contextmanager
  def failing(self, kind: str, **options) -> Iterator[Failure]:
    """Fails requests of a kind."""
    self.failure = Failure(kind, **options)
    try:
      yield self.failure
    finally:
      self.failure = None

  @contextlib.contextmanager
  def under_way(self):
    """Counts a request as under way."""
    with self.lock:
      self._under_way += 1
      self.count.most_at_once = max(self.count.most_at_once, self._under_way)
    try:
      time.sleep(self.seconds)
      yield
    finally:
      with self.lock:
        self._under_way -= 1

  def fails(self, kind: str, name: str) -> int | None:
    """The status with which a request fails; None if it does not."""
    failure = self.failure
    if failure is None or failure.kind != kind or failure.name not in name:
      return None
    failure.after -= 1
    if failure.after >= 0 or failure.times <= 0:
      return None
    failure.times -= 1
    return failure.status


class _Handler(server.RequestHandler):
  """The emulator's, for one request."""

  def __init__(self, cloud: Cloud, *args, **kwargs):
    self._cloud = cloud
    self._kind, self._place, self._status = "", ("", ""), 0
    super().__init__(*args, **kwargs)

  def do_GET(self):
    self._answer("GET")

  def do_POST(self):
    self._answer("POST")

  def do_DELETE(self):
    self._answer("DELETE")

  def do_PUT(self):
    self._answer("PUT")

  def log_message(self, format, *args):  # noqa: A002
    """Says nothing."""

  def _answer(self, method):
    cloud, url = self._cloud, parse.urlsplit(self.path)
    self._kind, self._place = _request(method, url)
    with cloud.under_way(), cloud.lock:
      cloud.count.requests[self._kind] += 1
      cloud.count.names.append((self._kind, self._place[1]))
      status = cloud.fails(self._kind, self._place[1])
      if status is not None:
        self._fail(status)
        return
      self._count_bytes()
      move = re.fullmatch(r"(.*)/moveTo/o/(.*)", url.path)
      if move:
        self.path = f"{move[1]}/rewriteTo/b/{self._place[0]}/o/{move[2]}"
      if self._kind == LIST:
        self._list(parse.parse_qs(url.query))
      else:
        server.Router(self).handle(method)
      cloud.count.absent += self._status == 404
      if move and self._status < 300:
        self.storage.delete_file(*self._place)

  def _list(self, query):
    """Lists a page of names: the emulator knows no pages, and none of the limits that TensorStore gives."""
    of = lambda name, default: query.get(name, [default])[0]
    items, prefixes = self.storage.get_file_list(self._place[0], of("prefix", None), of("delimiter", None))
    begin, end, start = of("startOffset", ""), of("endOffset", chr(0x10FFFF)), int(of("pageToken", 0))
    found = [item for item in items if begin <= item["name"] < end]
    most = min(int(of("maxResults", _PAGE)), _PAGE)
    page = {"kind": "storage#objects", "items": found[start : start + most], "prefixes": prefixes if not start else []}
    self._send(200, page | ({"nextPageToken": str(start + most)} if len(found) > start + most else {}))

  def _fail(self, status):
    self.rfile.read(int(self.headers.get("Content-Length") or 0))
    if status == CLOSED:
      self.connection.shutdown(socket.SHUT_RDWR)
      self.close_connection = True
    else:
      self._send(status, {"error": {"code": status, "message": "as the test wants"}})

  def _send(self, status, document):
    body = json.dumps(document).encode()
    self.send_response(status)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _count_bytes(self):
    if self._kind == UPLOAD:
      self._cloud.count.nbytes[UPLOAD] += int(self.headers.get("Content-Length") or 0)
    elif self._kind == COPY:
      with contextlib.suppress(Exception):
        self._cloud.count.nbytes[COPY] += int(self.storage.get_file_obj(*self._place)["size"])

  def send_response(self, code, message=None):
    self._status = code
    super().send_response(code, message)

  def send_header(self, keyword: str, value: Any):
    if keyword == "Content-Length" and self._kind == READ and self._status < 300:
      self._cloud.count.nbytes[READ] += int(value)
      # What TensorStore reads, and the emulator leaves out.
      super().send_header("x-goog-generation", str(self.storage.get_file_obj(*self._place)["generation"]))
    super().send_header(keyword, value)


def _request(method, url) -> tuple[str, tuple[str, str]]:
  """The kind of a request, and the bucket and the name of its object."""
  query = parse.parse_qs(url.query)
  if url.path.startswith("/upload/"):
    return UPLOAD, ("", query.get("name", [""])[0])
  if url.path.endswith("/o"):
    return LIST, (url.path.split("/")[-2], query.get("prefix", query.get("startOffset", [""]))[0])
  if not (found := _OBJECT.search(url.path)):
    return BUCKET, ("", "")
  place = found["bucket"], parse.unquote(found["name"])
  if method == "DELETE":
    return DELETE, place
  if method == "POST":
    return COPY, place
  is_read = url.path.startswith("/download/") or query.get("alt") == ["media"]
  return (READ if is_read else STAT), place
