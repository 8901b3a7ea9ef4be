"""Single-line mutations, each of which a test of its area has to notice.

Fields: file, what stands there (once in the file), what is put there instead,
and the tests that are run: paths with `::name`, or `[case]` behind that.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
  """One wrong line."""

  path: str
  old: str
  new: str
  tests: tuple[str, ...]


_MODELS = "argenseg_jax/models"
_LLM = "tests/models/llm_test.py"
_LAYERS = "tests/models/layers_test.py"
_VIT = "tests/models/vit_test.py"
_VQ = "tests/models/vq_test.py"
_VQVAE = "tests/models/vqvae_test.py"
_ATTENTION = "tests/models/attention_test.py"
_GENERATE = "tests/inference/generate_test.py"
_PREPROCESS = "tests/data/golden_preprocess_test.py"
_LOSSES = "tests/models/losses_test.py"
_TEXT = "tests/data/text_test.py"
_MASKS = "tests/data/masks_test.py"
_STEP = "tests/training/step_test.py"
_METRICS = "tests/evaluation/segmentation_metrics_test.py"
_VQA = "tests/evaluation/vqa_metrics_test.py"
_DAMAGE = "tests/faults/damage_test.py"
_COMMAND = "tests/faults/checkpoint_command_test.py"
_MAPPING = "tests/torch_weights/mapping_test.py"


def _golden(folder: str) -> str:
  return (
    "tests/torch_weights/parity/golden_test.py::test_every_array_agrees"
    f"[{folder}]"
  )


def _of(path: str, *tests: str):
  """The mutations of a file, all run against the same tests."""

  def make(old: str, new: str, *others: str) -> Mutation:
    return Mutation(path, old, new, others or tests)

  return make


_layers = _of(f"{_MODELS}/layers.py", _LLM)
_resize = _of(f"{_MODELS}/resize.py", _VQ)
_llm = _of(f"{_MODELS}/llm.py", _LLM)
_attention = _of(f"{_MODELS}/attention.py", _ATTENTION)
_vit = _of(f"{_MODELS}/vit.py", _VIT)
_vqvae = _of(f"{_MODELS}/vqvae.py", _VQVAE)
_argenseg = _of(f"{_MODELS}/argenseg.py", _GENERATE)
_losses = _of(f"{_MODELS}/losses.py", _LOSSES)
_vq = _of(f"{_MODELS}/vq.py", _VQ)
_generate = _of("argenseg_jax/inference/decoding.py", _GENERATE)
_text = _of("argenseg_jax/data/chat.py", _TEXT, _PREPROCESS)
_masks = _of("argenseg_jax/data/masks.py", _MASKS)
_transforms = _of(
  "argenseg_jax/data/transforms.py", "tests/data/transforms_test.py"
)
_step = _of("argenseg_jax/training/step.py", _STEP)
_optimizer = _of(
  "argenseg_jax/training/optimizer.py", "tests/training/optimizer_test.py"
)
_metrics = _of("argenseg_jax/evaluation/segmentation_metrics.py", _METRICS)
_vqa = _of("argenseg_jax/evaluation/vqa_metrics.py", _VQA)
_manifest = _of("argenseg_jax/checkpoint/manifest.py", _DAMAGE, _COMMAND)
_families = _of("argenseg_jax/torch_weights/families.py", _MAPPING)
_tables = _of("argenseg_jax/torch_weights/tables.py", _MAPPING)
_rules = _of("argenseg_jax/torch_weights/rules.py", _MAPPING)

MUTATIONS = (
  # Models.
  _layers(
    "a * cos - b * sin", "a * cos + b * sin", _golden("internlm2_linear")
  ),
  _layers(
    "y -= jnp.mean(y, -1, keepdims=True)",
    "y -= 0.0",
    _golden("internvit_rmsnorm"),
  ),
  _layers(
    "return self.scale[...].astype(x.dtype) * y.astype(x.dtype)",
    "return y.astype(x.dtype)",
    _golden("internlm2_linear"),
  ),
  _layers(
    "length / max_positions - (factor - 1)",
    "length / max_positions",
    _golden("internlm2_dynamic"),
  ),
  _layers("y -= self._group_mean(y)", "y -= 0.0", _LAYERS),
  _resize("= 1 / (stop - start)", "= 1 / source"),
  _resize("* source / target - 0.5", "* source / target"),
  _layers("(rows, columns), -1", "(columns, rows), -1", _LAYERS),
  _llm(
    "jax.nn.silu(gate) * up",
    "gate * jax.nn.silu(up)",
    _golden("internlm2_linear"),
  ),
  _llm("return x + self.mlp(", "return self.mlp(", _golden("internlm2_linear")),
  _llm("      start + reach,", "      start + reach - 1,"),
  _llm("corner = (index, 0, start, 0, 0)", "corner = (index, 0, 0, 0, 0)"),
  _llm("is_pad = (tokens ==", "is_pad = (tokens !="),
  _attention("queries * hd**-0.5", "queries * hd**0.5"),
  _attention("<= reach[:, :, None]", "< reach[:, :, None]", _LLM),
  _attention("visible & same &", "visible &", _LLM),
  _attention("total * shrink + jnp.sum", "total + jnp.sum"),
  _attention("v[j], 2, 2) - shared[i]", "v[j], 2, 2)"),
  _vit(
    "patches = hidden[:, 1:]",
    "patches = hidden[:, :-1]",
    _VIT,
    _golden("internvit_rmsnorm"),
  ),
  _vit("(0, 1, 3, 2, 4, 5))", "(0, 1, 3, 4, 2, 5))"),
  _vit("x / keep.astype(x.dtype), 0)", "x, 0)"),
  _vqvae(
    "return x + self.out(y",
    "return self.out(y",
    _VQVAE,
    "tests/torch_weights/transformers_test.py",
  ),
  _vqvae("return jnp.clip(images, -1, 1)", "return jnp.clip(images, 0, 1)"),
  _argenseg("/ 255.0 * 2.0 - 1.0", "/ 255.0 - 0.5", _PREPROCESS),
  _argenseg("255.0 - mean) / std", "255.0 - mean) * std", _PREPROCESS),
  _argenseg("reverse=True) - 1", "reverse=True)"),
  _argenseg("self.scales.counts)[level] - 1", "self.scales.counts)[level]"),
  _argenseg("jnp.cumsum(where, axis=1) - 1", "jnp.cumsum(where, axis=1)"),
  # Losses.
  _losses("first_code + flat", "flat"),
  _losses("order % codes_per_mask", "order"),
  _losses("self.text / jnp.maximum(text_count, 1)", "self.text"),
  _losses("jnp.where(code_index >= 0, 0.0, per_token)", "per_token"),
  _losses("- logits * truth", "+ logits * truth"),
  _losses("(1.0 - overlap / total)", "(overlap / total)"),
  Mutation(
    "argenseg_jax/training/objectives.py",
    "jnp.mean(sums.scale_means(counts))",
    "jnp.sum(sums.scale_means(counts))",
    ("tests/training/objectives_test.py",),
  ),
  # Quantizer.
  _vq("self.commitment * pull + push", "pull + push"),
  _vq("(partial - target) ** 2", "(partial - latent) ** 2"),
  _vq("self.vectors_at(partial, k + 1)", "self.vectors_at(partial, k)"),
  _vq("(1 - self.phi_ratio) * x +", "x +"),
  _vq("stop_gradient(latent - partial)", "stop_gradient(latent)"),
  _vq("index = self.scales.phi_index[k]", "index = 0"),
  _vq("self.assignment_cost[...][k]", "self.assignment_cost[...][0]"),
  # Text.
  _text("] = ids[assistant:-1]", "] = ids[assistant - 1 : -2]"),
  _text("label[assistant:-1] =", "label[assistant:] ="),
  _text(
    "label[label == special.ge_end] = special.mask_context",
    "label[label == special.ge_end] = special.ge_end",
  ),
  _text("* (num_codes - 1)", "* num_codes"),
  _text("np.arange(len(sample))", "np.arange(start, stop)"),
  _text("[start : start + first] = True", "[start:stop] = True"),
  _text("np.cumsum(real) - 1, 1", "np.cumsum(real), 1"),
  _text("missing + said[0][1]", "said[0][1] + missing"),
  # Masks and images.
  _masks("value -= 1 << shift", "value -= 1 << (shift - 1)"),
  _masks("if len(runs) > 2 else", "if len(runs) > 1 else"),
  _masks("flat.reshape(width, height).T", "flat.reshape(height, width)"),
  _transforms(
    "gray > MASK_THRESHOLD * 255", "gray > MASK_THRESHOLD * 256", _PREPROCESS
  ),
  _transforms(
    "(side - height) // 2, (side - width) // 2",
    "(side - width) // 2, (side - height) // 2",
  ),
  _transforms(
    "seg_mask = seg_mask.astype(np.uint8) * np.uint8(255)",
    "seg_mask = seg_mask.astype(np.uint8) * np.uint8(254)",
    _PREPROCESS,
  ),
  Mutation(
    "argenseg_jax/inference/segment.py",
    "((x + 1) / 2 * 255)",
    "jnp.round((x + 1) / 2 * 255)",
    ("tests/data/transforms_test.py",),
  ),
  # Training step.
  _step(
    'jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])',
    'jnp.isfinite(metrics["loss"])',
  ),
  _step("(1.0 + step) / (10.0 + step)", "(10.0 + step) / (1.0 + step)"),
  _step("a + (1 - keep) * (p.astype", "a + keep * (p.astype"),
  _step("lambda x: lax.psum(x, ", "lambda x: lax.pmax(x, "),
  Mutation(
    "argenseg_jax/training/objectives.py",
    "count = jnp.sum(valid) if count is None else count",
    "count = jnp.sum(valid)",
    (_STEP,),
  ),
  _optimizer(
    "variable.replace(len(axes) > 1)", "variable.replace(len(axes) > 0)"
  ),
  _optimizer("peak / warmup, peak,", "0.0, peak,"),
  _optimizer("is_param and not any", "is_param and any"),
  # Metrics.
  _metrics("np.count_nonzero(prediction | truth)", "np.count_nonzero(truth)"),
  _metrics("if union else 1.0", "if union else 0.0"),
  _metrics("self.samples - self.no_target", "self.samples"),
  _metrics("int(iou > p)", "int(iou >= p)"),
  _vqa("min(len(known), 3)", "len(known)"),
  _vqa("commonest = max(", "commonest = min("),
  # Checkpoints.
  _manifest("if there[name].size != size:", "if False:"),
  _manifest("      if not same:", "      if same:"),
  _manifest("there.keys() - wanted.keys()", "wanted.keys() - there.keys()"),
  # Weight rules.
  _families(
    "k = groups[:, -2]", "k = groups[:, -1]", _golden("internlm2_linear")
  ),
  _tables(
    "lambda x: x.transpose(2, 3, 1, 0)",
    "lambda x: x.transpose(3, 2, 1, 0)",
    _MAPPING,
    "tests/torch_weights/transformers_test.py",
  ),
  _families(
    'feed_forward.w1", f"{ours}mlp.gate"',
    'feed_forward.w1", f"{ours}mlp.up"',
    _golden("internlm2_linear"),
  ),
  _tables("one(lambda x: x[0, 0],", "one(lambda x: x[0, -1],"),
  # Generation.
  _generate(
    "* wide[:rows] - ramp * wide[rows:]",
    "* wide[rows:] - ramp * wide[:rows]",
    _golden("argenseg_small"),
  ),
  _generate(
    "options.guidance * k / max(len(scales) - 1, 1)",
    "options.guidance",
    _golden("argenseg_small"),
  ),
  _generate("jnp.where(masked, n, 0)", "jnp.where(masked, n - 1, 0)"),
  # Data and kernels.
  Mutation(
    "argenseg_jax/data/pipeline.py",
    "seed(seed + n).shuffle().repeat()",
    "seed(seed + n).shuffle().repeat(reseed_each_epoch=False)",
    (
      "tests/data/pipeline_test.py::test_sources_of_a_mixture_are_shuffled_anew_each_epoch",
    ),
  ),
  Mutation(
    "kernels/scale_prediction/xla.py",
    "rows=index[None],",
    "rows=None,",
    (
      "tests/kernels/ops_test.py::test_rows_of_later_blocks_draw_noise_of_their_own",
    ),
  ),
  Mutation(
    f"{_MODELS}/flops.py",
    "(12 + 2 * moments) * trains",
    "(12 + moments) * trains",
    ("tests/models/flops_test.py",),
  ),
)
