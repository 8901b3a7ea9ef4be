"""The decoder and the vision tower against Hugging Face's, random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from argenseg_jax import construct, variants
from argenseg_jax.model_config import VisionConfig
from argenseg_jax.models.llm import Decoder
from argenseg_jax.models.vit import VisionEncoder
from argenseg_jax.torch_weights import (
  families,
  hf_config,
  importing,
  mapping,
  rules,
  tensors,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def _source(arrays):
  return tensors.Computed(
    {
      n: (tensors.TensorInfo(a.shape, a.dtype), lambda a=a: a)
      for n, a in arrays.items()
    }
  )


def _ours(make, table, source):
  graph, state = nnx.split(construct.abstract(make))
  mapping.check(table, mapping.variables(state), source, "transformers")
  mesh = importing.conversion_mesh()
  state, _ = mapping.load(table, state, source, mesh)
  return graph, state


def _qwen_config(family, **changes):
  make = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
  return make[family](
    **dict(
      vocab_size=60,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=3,
      num_attention_heads=4,
      num_key_value_heads=2,
      rope_theta=1e6,
      attn_implementation="eager",
    )
    | ({"head_dim": 10} if family == "qwen3" else {})
    | changes
  )


def _qwen(config):
  made = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
  name = made[config.model_type]
  return name, getattr(transformers, name)(config).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen(family, tied):
  torch.manual_seed(0)
  name, theirs = _qwen(_qwen_config(family, tie_word_embeddings=tied))
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.copy_(torch.randn_like(parameter) * 0.3)
  arrays = {n: t.numpy() for n, t in theirs.state_dict().items()}
  if tied:
    arrays.pop("lm_head.weight", None)
  values = theirs.config.to_dict() | {"architectures": [name]}
  config = hf_config.llm_config(values, tied_head=tied)
  assert config.family == family
  graph, state = _ours(
    lambda: Decoder(config, rngs=construct.Rngs(0)),
    families.table(config),
    _source(arrays),
  )
  tokens = np.random.default_rng(0).integers(0, 60, (2, 17))
  with torch.no_grad():
    wanted = theirs(torch.tensor(tokens)).logits.numpy()

  @jax.jit
  def run(state, tokens):
    model = nnx.merge(graph, state)
    hidden, _ = model(
      model.embed(tokens),
      positions=jnp.broadcast_to(jnp.arange(17), tokens.shape),
      segment_ids=jnp.ones_like(tokens),
    )
    return hidden @ model.head.T

  found = run(state, jnp.asarray(tokens, jnp.int32))
  np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
  "variant", [n for n, c in variants.VARIANTS.items() if "qwen" in c.llm.family]
)
def test_manifest_of_qwen_sizes(variant):
  """Names and shapes are those that transformers makes of our config.json."""
  config = variants.get(variant).llm
  values = hf_config.write_llm(config)
  keys = {k: v for k, v in values.items() if k not in ("model_type", "dtype")}
  with torch.device("meta"):
    _, theirs = _qwen(_qwen_config(config.family, **keys))
  wanted = {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
  state = nnx.state(
    construct.abstract(lambda: Decoder(config, rngs=construct.Rngs(0)))
  )
  leaves = mapping.variables(state)
  assert mapping.torch_shapes(families.table(config), leaves) == wanted
  assert hf_config.llm_config(values, tied_head=config.tied_head) == config


# Transformers' own naming of InternViT -> the authors', which we read.
_VISION_NAMES = (
  ("embeddings.cls_token", "embeddings.class_embedding"),
  ("embeddings.position_embeddings", "embeddings.position_embedding"),
  ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
  ("encoder.layer.", "encoder.layers."),
  ("attention.projection_layer", "attn.proj"),
  ("attention.q_norm", "attn.q_norm"),
  ("attention.k_norm", "attn.k_norm"),
  ("layernorm_before", "norm1"),
  ("layernorm_after", "norm2"),
  ("lambda_1", "ls1"),
  ("lambda_2", "ls2"),
)


def _authors_names(state):
  """Renames, and fuses q, k and v as the authors do."""
  arrays = {}
  for name, tensor in state.items():
    for theirs, authors in _VISION_NAMES:
      name = name.replace(theirs, authors)
    arrays["vision_model." + name] = tensor.numpy()
  for name in [n for n in arrays if "attention.q_proj" in n]:
    parts = [
      arrays.pop(name.replace("q_proj", f"{p}_proj")) for p in ("q", "k", "v")
    ]
    fused = name.replace("attention.q_proj", "attn.qkv")
    arrays[fused] = np.concatenate(parts)
  return arrays


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_internvit(norm):
  torch.manual_seed(0)
  qk_norm = norm == "rms_norm"
  theirs = transformers.InternVLVisionModel(
    transformers.InternVLVisionConfig(
      hidden_size=32,
      num_hidden_layers=3,
      num_attention_heads=4,
      intermediate_size=48,
      image_size=[56, 56],
      patch_size=[14, 14],
      norm_type=norm,
      use_qk_norm=qk_norm,
      attention_bias=not qk_norm,
      use_absolute_position_embeddings=True,
      use_mean_pooling=True,
      hidden_act="gelu",
      attn_implementation="eager",
    )
  ).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.copy_(torch.randn_like(parameter) * 0.3)
  config = VisionConfig(
    image_side=56,
    width=32,
    num_layers=3,
    num_heads=4,
    mlp_width=48,
    norm=norm,
    qk_norm=qk_norm,
    qkv_bias=not qk_norm,
  )
  rng = np.random.default_rng(0)
  connector = {
    "mlp1.0.weight": (128,),
    "mlp1.0.bias": (128,),
    "mlp1.1.weight": (16, 128),
    "mlp1.1.bias": (16,),
    "mlp1.3.weight": (16, 16),
    "mlp1.3.bias": (16,),
  }
  arrays = _authors_names(theirs.state_dict()) | {
    n: rng.normal(size=s).astype(np.float32) for n, s in connector.items()
  }
  graph, state = _ours(
    lambda: VisionEncoder(config, 16, rngs=construct.Rngs(0)),
    rules.internvit(config),
    _source(arrays),
  )
  images = rng.normal(size=(2, 56, 56, 3)).astype(np.float32)
  with torch.no_grad():
    pixels = torch.tensor(np.moveaxis(images, -1, 1).copy())
    wanted = theirs(pixels).last_hidden_state.numpy()
  found = jax.jit(lambda s, x: nnx.merge(graph, s).tower(x))(state, images)
  np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_pickles_of_tensors_are_read_and_others_refused(tmp_path):
  path = tmp_path / "x.pth"
  wanted = {
    "a": torch.arange(6.0).reshape(2, 3).T,
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
  }
  torch.save(wanted, path)
  source = tensors.open_file(path)
  np.testing.assert_array_equal(source.read("a"), wanted["a"].numpy())
  assert source.tensors["b"].dtype == tensors.DTYPES["BF16"]
  np.testing.assert_array_equal(source.read("b").astype(np.float32), [1.5, -2])
  torch.save({"a": print}, path)
  with pytest.raises(tensors.WeightsError, match="refused"):
    tensors.open_file(path)


def test_a_torch_view_of_one_number_is_not_unfolded(tmp_path):
  path = tmp_path / "x.pth"
  torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)
  with pytest.raises(
    tensors.WeightsError, match=r"'a'.* is larger than the file"
  ):
    tensors.PickleFile(path)
  torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, path)
  with pytest.raises(tensors.WeightsError, match="'a' is a complex64"):
    tensors.PickleFile(path)
