"""Google Cloud Storage on this machine, in memory: gcp-storage-emulator and
what it lacks, preconditions on generations.

By hand, `python tests/gcs_emulator.py PORT` serves until it is killed.
"""

import contextlib
import io
import logging
import re
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound

BUCKET = "bucket"
_ONE = threading.Lock()  # Writes are whole, and follow what was seen.


class _Handler(server.RequestHandler):
  """Refuses a write of another generation than the one that it names, and
  names that of what is read."""

  _acquired = False

  def parse_request(self):
    if not super().parse_request():
      return False
    _ONE.acquire()  # Until `finish`: a connection has one request.
    self._acquired = True
    (wanted,) = self._query().get("ifGenerationMatch", [None])
    if wanted is None:
      return True
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    self.rfile = io.BytesIO(body)  # For whoever answers.
    if wanted == self._generation(body):
      return True
    self.send_response(HTTPStatus.PRECONDITION_FAILED)
    self.send_header("Content-Length", "2")
    self.end_headers()
    self.wfile.write(b"{}")
    return False

  def finish(self):
    try:
      super().finish()
    finally:
      if self._acquired:
        _ONE.release()

  def end_headers(self):
    if self.command == "GET" and "alt=media" in self.path:
      self.send_header("x-goog-generation", self._generation(b""))
    super().end_headers()

  def _query(self):
    return server.parse_qs(server.urlparse(self.path).query)

  def _generation(self, body: bytes) -> str:
    path = server.urlparse(self.path).path
    if path.endswith("/o"):
      name = self._query().get("name", [None])[0]
      name = name or re.search(rb'"name": ?"([^"]+)"', body)[1].decode()
    else:
      name = server.unquote(path.split("/o/")[1])
    try:
      return self.storage.get_file_obj(BUCKET, name)["generation"]
    except NotFound:
      return "0"


class _Quiet(server.server.ThreadingHTTPServer):
  def handle_error(self, request, client_address):
    """Clients hang up when they have read enough."""


@contextlib.contextmanager
def running(port: int = 0) -> Iterator[dict[str, str]]:
  """Serves a bucket called `BUCKET`; gives the environment for clients."""
  logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
  made = server.create_server(
    "127.0.0.1", port, in_memory=True, default_bucket=BUCKET
  )
  handler = server.partial(_Handler, made._storage)
  with _Quiet(("127.0.0.1", port), handler) as http:
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{http.server_port}"
    yield {
      "STORAGE_EMULATOR_HOST": address,
      "TENSORSTORE_GCS_HTTP_URL": address,
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # Asks another server.
      # Else both are looked for.
      "GOOGLE_CLOUD_PROJECT": "none",
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
    http.shutdown()
    thread.join()


if __name__ == "__main__":
  with running(int(sys.argv[1])) as environment:
    for item in environment.items():
      print("export {}={}".format(*item), flush=True)
    threading.Event().wait()
