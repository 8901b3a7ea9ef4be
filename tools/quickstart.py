"""`argenseg quickstart`: the whole system at its smallest size."""

import argparse
import pathlib
import sys

from ml_collections import ConfigDict

# Minutes that the full recipe takes on two quiet cores; `--minutes` scales the
# steps of training around it.
FULL_MINUTES = 14.0
MOST_MINUTES = 10_000


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="argenseg quickstart",
    description="Builds ref_shapes, trains the image tokenizer and the "
    "decoder, evaluates, and leaves results.json, checkpoints and reports. "
    "Interrupted, the same command resumes.",
    epilog="Example: argenseg quickstart --workdir=runs/quickstart",
  )
  parser.add_argument("--workdir", default="runs/quickstart")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--minutes",
    type=float,
    default=FULL_MINUTES,
    help="about how long training may take; fewer give a worse model",
  )
  args = parser.parse_args(argv)
  from argenseg_jax.config import ConfigError
  from argenseg_jax.config_parsing import run_config
  from argenseg_jax.runtime import cpu, paths, preemption
  from argenseg_jax.runtime.nan_guard import Diverged
  from argenseg_jax.training import loop, quickstart

  if not 0 < args.minutes <= MOST_MINUTES:
    raise ConfigError(
      f"--minutes={args.minutes:g} must be above 0 and at most {MOST_MINUTES}."
    )
  workdir = paths.disk_path(args.workdir).absolute()
  config = scaled_config(args.seed, args.minutes / FULL_MINUTES)
  config.data.path = str(workdir / "data")
  num_train = max(min(int(30_000 * args.minutes / FULL_MINUTES), 60_000), 256)
  num_eval = max(min(int(500 * args.minutes / FULL_MINUTES), 500), 32)
  run = run_config(config)
  cpu.use_all_cores(run)
  try:
    results = quickstart.run(
      run, workdir, num_train=num_train, num_eval=num_eval
    )
  except preemption.Interrupted as stopped:
    print(f"argenseg quickstart: {stopped}", file=sys.stderr)
    return stopped.code
  except Diverged as error:
    print(f"argenseg quickstart: {error}", file=sys.stderr)
    return loop.DIVERGED
  print(summary(results, workdir))
  return 0


def scaled_config(seed: int, scale: float) -> ConfigDict:
  """configs/tiny.py with all lengths of training scaled."""
  from argenseg_jax.configs import tiny

  config = tiny.get_config()
  config.seed = config.data.seed = seed
  scaled = (
    (config.vqvae.train, ("steps", "save_every")),
    (config.mllm.train, ("steps", "save_every", "eval_every")),
    (
      config.tokenizer_training,
      ("warm_start_steps", "revive_until", "entropy_from", "entropy_every"),
    ),
    (config.data, ("warmup_steps",)),
    (config.vqvae.optimizer, ("warmup_steps",)),
    (config.mllm.optimizer, ("warmup_steps",)),
  )
  for group, keys in scaled:
    for key in keys:
      group[key] = max(int(group[key] * scale), 1)
  return config


def summary(results: dict, workdir: pathlib.Path) -> str:
  """What a person wants to know at the end, and what to try next."""
  total = sum(results["seconds"].values())
  lines = [
    "",
    f"image tokenizer ceiling: cIoU {results['tokenizer_ceiling']['ciou']:.3f}",
  ]
  for split, metrics in results["splits"].items():
    lines.append(
      f"{split:6} cIoU {metrics['ciou']:.3f}  gIoU {metrics['giou']:.3f}  "
      f"Pr@0.5 {metrics['pr@0.5']:.3f}  invalid {metrics['invalid']}  "
      f"grounding gap {metrics.get('grounding_gap', float('nan')):.2f}"
    )
  lines += [
    f"{results['parameters']['total'] / 1e6:.2f} M parameters, "
    f"{total / 60:.1f} minutes",
    "",
    f"Look at {workdir / 'report.html'}.",
    "Next, segment any image:",
    f"  argenseg predict --checkpoint={workdir / 'mllm'} --image=FILE \\",
    '    --text="the red circle" --out=mask.png',
    "or train on your own masks: docs/own_masks.md.",
  ]
  return "\n".join(lines)
