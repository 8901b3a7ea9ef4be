"""Commands and manifests that start a training run on several hosts.

  python -m argenseg_jax.tools.launch KIND [options] -- argenseg train ...

KIND is tpu-vm, queued-resource or xpk (Google Cloud), jobset (Kubernetes with
GPUs) or sbatch (Slurm). Prints what it would do; --run does it (kubectl apply
and sbatch read the printed file). Example:

  python -m argenseg_jax.tools.launch queued-resource --name=arg --zone=ZONE \\
    --topology=v5p:4x4x4 --source=git+https://HOST/argenseg_jax -- \\
    argenseg train --config=configs/argenseg_8b_stage1.py --workdir=gs://B/stage1
"""

import argparse
import pathlib
import shlex
import string
import subprocess
import sys

from argenseg_jax.config import ConfigError
from argenseg_jax.planning.topology import parse

# Chip -> prefix of the accelerator type, what it counts per chip, runtime.
_TPUS = {
  "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite"),
  "v5p": ("v5p", 2, "v2-alpha-tpuv5"),  # Counts cores.
  "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}
_HERE = pathlib.Path(__file__).parent
_PORT = 8476


def main(argv: list[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  train = []
  if "--" in argv:
    at = argv.index("--")
    argv, train = argv[:at], argv[at + 1 :]
  parser = argparse.ArgumentParser(
    prog="python -m argenseg_jax.tools.launch",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  kinds = {
    "tpu-vm": tpu_vm,
    "queued-resource": queued_resource,
    "xpk": xpk,
    "jobset": jobset,
    "sbatch": sbatch,
  }
  parser.add_argument("kind", choices=kinds)
  parser.add_argument("--name", default="argenseg", help="of the job")
  parser.add_argument("--topology", default="v5e:16x16", help="CHIP:SIZE")
  parser.add_argument("--slices", type=int, default=1)
  parser.add_argument("--zone", default="us-east5-a")
  parser.add_argument("--spot", action="store_true")
  parser.add_argument("--cluster", default="", help="of xpk")
  parser.add_argument("--image", default="", help="container with argenseg_jax")
  parser.add_argument("--hosts", type=int, default=1, help="with GPUs")
  parser.add_argument("--gpus", type=int, default=8, help="of a host")
  parser.add_argument(
    "--source",
    default="",
    help="what pip installs on TPU hosts: a git+https address",
  )
  parser.add_argument("--run", action="store_true", help="do it")
  options = parser.parse_args(argv)
  if not train:
    parser.error("give the training command after --")
  try:
    printed, commands = kinds[options.kind](options, train)
  except ConfigError as error:
    parser.error(str(error))
  if printed:
    print(printed)
  for command in commands:
    print(shlex.join(command), flush=True)
    if options.run:
      subprocess.run(command, input=printed or None, text=True, check=True)
  return 0


def tpu_vm(options, train):
  """Creates one slice and starts training on all of its hosts."""
  accelerator, runtime = _tpu(options)
  if options.slices > 1:
    raise ConfigError("several slices need KIND queued-resource or xpk.")
  place = [options.name, f"--zone={options.zone}"]
  create = [*_GCLOUD, "tpu-vm", "create", *place]
  create += [f"--accelerator-type={accelerator}", f"--version={runtime}"]
  create += ["--spot"] * options.spot
  return "", [create, *_start([options.name], options, train)]


def queued_resource(options, train):
  """Asks for slices, waits until they are there, starts training."""
  accelerator, runtime = _tpu(options)
  zone = f"--zone={options.zone}"
  request = f"{options.name}-request"
  create = [*_GCLOUD, "queued-resources", "create", request, zone]
  create += [
    f"--accelerator-type={accelerator}",
    f"--runtime-version={runtime}",
  ]
  if options.slices > 1:
    create += [
      f"--node-count={options.slices}",
      f"--node-prefix={options.name}",
    ]
    nodes = [f"{options.name}-{i}" for i in range(options.slices)]
  else:
    create += [f"--node-id={options.name}"]
    nodes = [options.name]
  create += ["--spot"] * options.spot
  describe = shlex.join(
    [
      *(*_GCLOUD, "queued-resources", "describe", request, zone),
      "--format=value(state.state)",
    ]
  )
  wait = f"until {describe} | grep -q ACTIVE; do sleep 60; done"
  return "", [create, ["bash", "-c", wait], *_start(nodes, options, train)]


def xpk(options, train):
  """One workload of a cluster that xpk has made."""
  accelerator, _ = _tpu(options)
  if not (options.cluster and options.image):
    raise ConfigError("xpk needs --cluster and --image.")
  return "", [
    [
      *("xpk", "workload", "create"),
      f"--cluster={options.cluster}",
      f"--workload={options.name}",
      f"--tpu-type={accelerator}",
      f"--num-slices={options.slices}",
      f"--docker-image={options.image}",
      "--max-restarts=10",
      f"--command={shlex.join(train)}",
    ]
  ]


def jobset(options, train):
  """A JobSet of one pod a host; process 0 coordinates."""
  if not options.image:
    raise ConfigError("jobset needs --image.")
  return _render("jobset.yaml", options, train), [
    ["kubectl", "apply", "-f", "-"]
  ]


def sbatch(options, train):
  """A batch job of one task a host."""
  return _render("slurm.sbatch", options, train), [["sbatch"]]


_GCLOUD = ("gcloud", "compute", "tpus")


def _tpu(options) -> tuple[str, str]:
  """Accelerator type and runtime version of a topology."""
  topology = parse(options.topology, options.slices)
  if topology.name not in _TPUS:
    raise ConfigError(
      f"Cloud TPU VMs come as {', '.join(_TPUS)}, not as {topology.name}."
    )
  prefix, counts, runtime = _TPUS[topology.name]
  chips = topology.num_chips // topology.slices
  return f"{prefix}-{chips * counts}", runtime


def _start(nodes: list[str], options, train):
  """Installs and trains on all hosts of all slices at the same time."""
  if not options.source:
    raise ConfigError("TPU hosts need --source, what pip installs there.")
  zone = f"--zone={options.zone}"
  install = (
    f"pip install -q {shlex.quote(f'argenseg_jax[tpu,gcs] @ {options.source}')}"
  )
  remote = f"--command={install} && {shlex.join(train)}"
  if len(nodes) == 1:
    return [[*_GCLOUD, "tpu-vm", "ssh", nodes[0], zone, "--worker=all", remote]]
  starts = [
    shlex.join([*_GCLOUD, "tpu-vm", "ssh", node, zone, "--worker=all", remote])
    for node in nodes
  ]
  return [["bash", "-c", " & ".join([*starts, "wait"])]]


def _render(template: str, options, train) -> str:
  return string.Template((_HERE / template).read_text()).substitute(
    name=options.name,
    hosts=options.hosts,
    gpus=options.gpus,
    image=options.image,
    port=_PORT,
    train=shlex.join(train),
  )


if __name__ == "__main__":
  sys.exit(main())
