"""What is offered, each row with the commands that show it.

`python -m walks.features`, in tests/, prints docs/features.md. The commands run
as they stand in a folder of `walking.furnish`; sizes are added to them.
"""

from typing import NamedTuple

TRAIN = "argenseg train --config=configs/own_masks.py --workdir=runs/{}"
EVAL = "argenseg eval --checkpoint=runs/mine/mllm --data"


class Feature(NamedTuple):
  """A row of the table.

  Attributes:
    name: what it is.
    commands: in order.
    shown: parts of what the last of them prints.
  """

  name: str
  commands: tuple[str, ...]
  shown: tuple[str, ...] = ()


def _trained(name: str, workdir: str, *given: str) -> Feature:
  flags = " ".join(f"--config.data.{key}" for key in given)
  return Feature(name, (f"{TRAIN.format(workdir)} {flags}",))


def _measured(name: str, given: str, *shown: str) -> Feature:
  return Feature(name, (f"{EVAL} {given}",), shown)


# The first trains what the others ask.
FEATURES = (
  _trained(
    "image tokenizer, then decoder, on masks of your own",
    "mine",
    "path=mine.jsonl",
  ),
  Feature(
    "reinforcement learning on the IoU of sampled masks",
    (
      f"{TRAIN.format('rl')} --config.tasks=\"('rl',)\" "
      "--config.init_from=runs/mine/mllm --config.data.path=mine.jsonl",
    ),
    ("ciou",),
  ),
  Feature(
    "a mask for a request",
    (
      "argenseg predict --checkpoint=runs/mine/mllm --image=PHOTO.jpg "
      '--text="the left box"',
    ),
  ),
  Feature(
    "the 512-pixel scales: 2,240 codes a mask",
    (
      "argenseg train --config=configs/argenseg_8b_stage1.py "
      "--config.model.variant=argenseg_8b_512 --config.data.mask_side=512 "
      "--config.data.mask_intermediate_side=0 "
      "--config.data.sequence_length=4096 --workdir=runs/512 "
      "--config.data.path=mine.jsonl",
      "argenseg predict --checkpoint=runs/512/mllm --image=PHOTO.jpg "
      '--text="the left box" --out=512.png --answer_prefix ""',
    ),
    ("a mask of",),
  ),
  Feature(
    "text to image, with guidance",
    (
      f"{TRAIN.format('drawings')} --config.data.source=text_to_image "
      "--config.data.path=drawings/pairs.jsonl --config.data.mask_channels=3",
      "argenseg generate --checkpoint=runs/drawings/mllm "
      '--text "a box" --guidance=4',
    ),
    ("wrote drawn_0.png",),
  ),
  Feature(
    "what is at a point",
    (
      "argenseg predict --checkpoint=runs/mine/mllm --image=PHOTO.jpg "
      "--point 8 5 --out=point.png",
    ),
  ),
  Feature(
    "what is in a box",
    (
      "argenseg predict --checkpoint=runs/mine/mllm --image=PHOTO.jpg "
      "--box 4 3 12 9 --out=box.png",
    ),
  ),
  *(
    _measured(
      f"requests by {text}",
      f"refer=refcoco:val --config.data.interactive={kind}",
      "ciou",
    )
    for kind, text in (
      ("point", "a point in words"),
      ("box", "a box in words"),
      ("drawn_point", "a drawn point"),
      ("drawn_box", "a drawn box"),
    )
  ),
  _trained(
    "several masks an answer",
    "several",
    "path=several.jsonl",
    "max_masks=2",
  ),
  _trained("several turns", "turns", "path=turns.jsonl", "max_masks=2"),
  _trained(
    "several images an example", "two", "path=two_images.jsonl", "max_images=2"
  ),
  _trained(
    "a class of an ADE20K image",
    "ade20k",
    "source=ade20k",
    "path=ADEChallengeData2016",
    "request=semantic",
  ),
  _trained(
    "a thing or stuff of a COCO panoptic image",
    "panoptic",
    "source=coco_panoptic",
    "path=coco/panoptic.json",
    "request=semantic",
  ),
  _trained(
    "ReasonSeg",
    "reason",
    "source=reason_seg",
    "path=reason_seg",
    "request=reasoning",
  ),
  _measured(
    "gRefCOCO with N-acc and T-acc", "grefer=grefcoco:train", "n_acc", "t_acc"
  ),
  _trained(
    "mixtures by weight and repeat_time",
    "mixture",
    "source=meta",
    "path=mixture/meta.json",
    "max_masks=2",
  ),
  _trained("packed rows", "packed_rows", "path=mine.jsonl", "pack=2"),
  Feature(
    "ArrayRecord shards, and codes from a file",
    (
      "argenseg data build jsonl=mine.jsonl --out=packed/mine --workers=1",
      "argenseg data tokenize array_record=packed/mine "
      "--checkpoint=runs/mine/vqvae --out=codes.npz",
      f"{TRAIN.format('codes')} --config.data.source=array_record "
      "--config.data.path=packed/mine --config.data.codes=codes.npz",
    ),
  ),
  _measured(
    "the merged protocol", "refer=refcoco:val --protocol=merged", "(merged)"
  ),
  _measured(
    "the per-expression protocol",
    "refer=refcoco:testA --protocol=per-expression",
    "(per-expression)",
  ),
  _measured("POPE", "jsonl=pope.jsonl", "yes_no_accuracy"),
  _measured("VQA", "jsonl=vqa.jsonl", "vqa_soft"),
  _measured("multiple choice", "jsonl=choice.jsonl", "choice_accuracy"),
  _measured("captions", "jsonl=captions.jsonl", "captions"),
  Feature(
    "the image tokenizer alone",
    (
      "argenseg eval --what=tokenizer --checkpoint=runs/mine/vqvae "
      "--data image_folder=seg_masks",
    ),
    ("boundary_f", "perplexity"),
  ),
  Feature(
    "a report, and predictions that are scored again",
    (
      f"{EVAL} refer=refcoco:val --report --out=scored",
      "argenseg eval --rescore=scored/refcoco_val/predictions.jsonl",
    ),
    ("ciou",),
  ),
  Feature(
    "a data set checked, and drawn",
    (
      "argenseg data check refer=refcoco grefer=grefcoco jsonl=chat.jsonl",
      "argenseg data show refer=refcoco --checkpoint=runs/mine/mllm "
      "--out=sheet.png",
    ),
  ),
  Feature(
    "checkpoints listed, verified and compared",
    (
      "argenseg checkpoint ls runs/mine/mllm",
      "argenseg checkpoint verify runs/mine/mllm",
      "argenseg checkpoint diff runs/mine/mllm runs/mine/mllm",
    ),
  ),
)

HEAD = """\
# What is offered, and the command that shows it

Each row has a walk in `tests/walks/features_test.py`, at tiny
sizes and on small data in the layouts that users have (`pytest -m long`); after
the first row the tests start from its image tokenizer. Made by
`python -m walks.features` in `tests/`; a test compares.

| Feature | Commands |
|---|---|
"""


def page() -> str:
  """docs/features.md."""
  lines = (
    f"| {feature.name} | {'<br>'.join(f'`{c}`' for c in feature.commands)} |"
    for feature in FEATURES
  )
  return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(page(), end="")
