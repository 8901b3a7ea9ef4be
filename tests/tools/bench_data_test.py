"""`argenseg bench data` names every way to store data and what it gives."""

import re

from argenseg_jax.tools import cli


def test_every_way_to_store_data_is_measured(capsys):
  argv = ["bench", "data", "--records=4", "--batches=1", "--steps=0"]
  assert cli.main(argv) == 0
  printed = capsys.readouterr().out
  rates = re.findall(r"^\| (.*) \| (\d+) \| (\d+) \|$", printed, re.M)
  names = [name for name, *_ in rates]
  assert [name.split(",")[0] for name in names] == [
    "448 px JPEG",
    "448 px JPEG",
    "the same JPEG packed",
    "packed with --resize_pictures",
  ]
  assert all(int(core) > 0 for _, core, _ in rates)
