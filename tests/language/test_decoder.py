"""The decoder beside transformers, on small random models of each architecture."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict

from webssl_jax import params as params_lib
from webssl_jax.language import load
from webssl_jax.language.decoder import apply, embed, init, template
from webssl_jax.language.generate import Sampling, draw, generate
from webssl_jax.language.sizes import decoder
from webssl_jax.sharding import mesh as mesh_lib
from webssl_jax.weights.stored import WeightsError

SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ARCHITECTURES = {
    "llama": dict(tie_word_embeddings=True, rope_parameters=SCALED),
    "qwen2": dict(rms_norm_eps=1e-6),
    "qwen3": dict(head_dim=16, tie_word_embeddings=True),
    "mistral": dict(sliding_window=4),
}
LENGTHS = (7, 4, 1)


def make(kind, folder, shard_size="5GB"):
    """A random model of transformers with weights large enough to tell mistakes apart."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL | ARCHITECTURES[kind])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + ("norm" in name))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """(their model, our config, our parameters)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param, folder)
    config = load.read_config(folder, "float32")
    return theirs, config, load.read_params(folder, config)


def batch(side, length=7):
    """Ids (B, T) and mask of texts of LENGTHS with padding on one side."""
    ids = np.random.default_rng(1).integers(1, 96, (len(LENGTHS), length))
    places = np.arange(length)
    mask = [places >= length - n if side == "left" else places < n for n in LENGTHS]
    return ids, np.array(mask)


def close(ours, theirs, mask):
    """To 1e-5 of the range of theirs, at real tokens."""
    theirs = theirs.numpy()[mask]
    assert np.abs(np.asarray(ours)[mask] - theirs).max() < 1e-5 * np.ptp(theirs)


@pytest.mark.parametrize("pair", list(ARCHITECTURES), indirect=True)
def test_logits_and_hidden_states_equal_those_of_transformers(pair):
    """From embeddings, with padding on either side. (From ids: the next test.)"""
    theirs, config, params = pair

    @jax.jit
    def read(params, embeddings, mask):
        out = apply(config, params, embeddings=embeddings, mask=mask, hidden=True)
        return out.logits, out.hidden

    for side in ("left", "right"):
        ids, mask = batch(side)
        tokens = torch.tensor(ids)
        with torch.no_grad():
            embeddings = theirs.get_input_embeddings()(tokens).numpy()
            wanted = theirs(tokens, attention_mask=torch.tensor(mask), output_hidden_states=True)
        np.testing.assert_array_equal(embed(params, ids), embeddings)
        logits, hidden = read(params, embeddings, mask)
        close(logits, wanted.logits, mask)
        assert len(hidden) == len(wanted.hidden_states) == config.depth + 1
        for ours, other in zip(hidden, wanted.hidden_states):
            close(ours, other, mask)


@pytest.mark.parametrize("pair", ["llama", "qwen2", "mistral"], indirect=True)
def test_greedy_tokens_equal_those_of_transformers(pair):
    """Theirs pads on the left, ours is given padding on the right: between prompt and answer."""
    theirs, config, params = pair
    left, left_mask = batch("left")
    wanted = theirs.generate(
        torch.tensor(left),
        attention_mask=torch.tensor(left_mask).long(),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, left.shape[1] :].numpy()
    ids, mask = batch("right")
    ids[mask] = left[left_mask]
    run = functools.partial(generate, config, params, ids, mask, jax.random.key(0), new_tokens=10)
    np.testing.assert_array_equal(run(np.array([-1])).tokens, wanted)
    end = int(wanted[0, 2])  # what follows an end token is gone, in each text by itself
    made = run(np.array([end]))
    for row, other, length in zip(np.asarray(made.tokens), wanted, made.lengths):
        assert length == (list(other).index(end) + 1 if end in other else 10)
        np.testing.assert_array_equal(row[:length], other[:length])
        assert (row[length:] == end).all()


def test_sampling_draws_from_the_tokens_that_top_k_and_top_p_leave():
    logits = np.log(np.tile([0.1, 0.5, 0.15, 0.25], (2000, 1)))
    drawn = np.asarray(draw(logits, Sampling(1.0, top_p=0.7), jax.random.key(0)))
    assert np.bincount(drawn, minlength=4) / 2000 == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.05)
    drawn = np.asarray(draw(logits, Sampling(0.5, top_k=3), jax.random.key(0)))
    squares = np.array([0, 0.5**2, 0.15**2, 0.25**2])
    assert np.bincount(drawn) / 2000 == pytest.approx(squares / squares.sum(), abs=0.05)


def test_files_of_several_shards_are_read_onto_a_mesh_and_written_back(tmp_path):
    theirs = make("llama", tmp_path / "theirs", shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    mesh = mesh_lib.create(ConfigDict(dict(replica=1, fsdp=4, tensor=2)))
    config = load.read_config(tmp_path / "theirs", "float32")
    params = load.read_params(tmp_path / "theirs", config, mesh)
    kernel = params["blocks"]["attn"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 32 // 4, 32 // 2)
    ids = np.arange(48).reshape(8, 6)
    with jax.set_mesh(mesh), torch.no_grad():
        logits = jax.jit(functools.partial(apply, config))(params, ids).logits
        close(logits, theirs(torch.tensor(ids)).logits, np.ones(ids.shape, bool))
    load.write_folder(tmp_path / "ours", config, params, max_file_bytes=20_000)
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (name, ours), other in zip(back.state_dict().items(), theirs.state_dict().values()):
        assert torch.equal(ours, other), name
    assert back.config.rope_parameters == theirs.config.rope_parameters
    next((tmp_path / "theirs").glob("model-00002*")).unlink()
    with pytest.raises(WeightsError, match="names files that are not there: model-00002"):
        load.read_params(tmp_path / "theirs", config)


def test_published_sizes_have_their_published_numbers_of_parameters():
    counts = {
        "llama-3-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "llama-3.2-1b": 1_235_814_400,
        "smollm2-135m": 134_515_008,
        "tinyllama-1.1b": 1_100_048_384,
        "qwen2.5-0.5b": 494_032_768,
        "qwen3-0.6b": 596_049_920,
        "mistral-7b": 7_248_023_552,
    }
    for size, parameters in counts.items():
        assert params_lib.count(template(decoder(size))) == parameters, size


def test_gradients_do_not_depend_on_what_is_saved_for_the_backward_pass():
    ids = np.arange(10).reshape(2, 5)
    gradients = []
    for remat in ("none", "named"):
        config = decoder("smollm2-135m", width=16, depth=2, heads=2, kv_heads=1, mlp_hidden=24)
        config = dataclasses.replace(config, vocabulary=32, remat=remat)

        def loss(params, config=config):
            logits = apply(config, params, ids).logits[:, :-1]
            gone = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(gone, ids[:, 1:, None], axis=-1).mean()

        gradients.append(jax.jit(jax.grad(loss))(init(config, jax.random.key(0))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *gradients)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients[0]))


def test_flops_are_those_of_the_weights_and_of_pairs_of_tokens():
    """The second of 7 tokens is compared with two, the last with seven; 2 of them are predicted."""
    config = decoder("llama-3-8b")
    weights = params_lib.flatten(template(config))
    blocks = sum(x.size for path, x in weights.items() if re.search("blocks/.*kernel", path))
    pairs = sum(range(1, 8)) * config.depth * config.heads * config.head_dim
    head = weights["lm_head/kernel"].size
    assert config.flops(7, predicted=2) == 2 * (7 * blocks + 2 * head) + 2 * 2 * pairs
    assert config.flops(7) - config.flops(7, predicted=0) == 2 * 7 * head
