"""Options of the small run that is killed, stopped and starved here."""

import pathlib


def options(data: pathlib.Path, workdir: pathlib.Path) -> list[str]:
  """Where it reads and writes; nothing is left to evaluate at its end."""
  workdir.mkdir(exist_ok=True)
  (workdir / "results.json").write_text("{}")
  return [f"--config.data.path={data}", f"--workdir={workdir}"]
