"""Tokenizers and chat templates beside transformers; a whole model in a folder, and bad input."""

import json
import shutil

import jax
import numpy as np
import pytest
import transformers

from tests.language.tiny import save
from webssl_jax.errors import UserError
from webssl_jax.language import load, model

# The ways in which templates of Llama 3, Qwen and Mistral are written.
TEMPLATE = """{%- if messages[0].role == 'system' %}
    {{- bos_token + '[S]' + messages[0].content | trim + '[/S]\\n' }}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- set seen = namespace(users=0) %}
{% for message in rest %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('only user and assistant, not ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}
        {%- set seen.users = seen.users + 1 %}
[{{ seen.users }} {{ message | tojson }} {{ message.content | trim }}]
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<a>' }}{% endif %}
{%- if tools is not none or documents %}unused{% endif %}
"""
CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": 'é <b> "quoted"'},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "tiny", TEMPLATE)


@pytest.fixture(scope="module")
def tiny(folder):
    return model.load(folder)


def test_chat_templates_render_as_transformers_renders_them(folder, tiny):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for messages in (CHAT, CHAT[1:], CHAT[1:3]):
        for prompt in (True, False):
            wanted = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert tiny.tokenizer.render(messages, prompt) == wanted
    text = "a brown dog </s> sat"
    assert tiny.tokenizer.encode(text) == theirs(text)["input_ids"]
    assert tiny.tokenizer.decode([1, 3, 5, 6, 2]) == theirs.decode(
        [1, 3, 5, 6, 2], skip_special_tokens=True
    )


def test_an_answer_does_not_depend_on_its_company_in_the_batch(tiny):
    prompts = ["a small brown dog", "sofa", [{"role": "user", "content": "why"}]]
    together = tiny.generate(prompts, new_tokens=8)
    assert len(set(together)) == 3
    assert tiny.generate([prompts[2], prompts[0], prompts[2]], new_tokens=8) == [
        together[2],
        together[0],
        together[2],
    ]
    states = tiny.hidden_states(["a small brown dog", "sofa"])
    assert states.hidden.shape == (3, 2, states.mask.shape[1], 16)
    np.testing.assert_array_equal(states.mask.sum(axis=1), [5, 2])  # <s> too


def test_a_model_in_bfloat16_holds_and_computes_in_it(folder):
    half = model.load(folder, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    assert half.config.dtype == "bfloat16"


def test_bad_input_is_one_line(folder, tiny, tmp_path):
    def refused(error, call, *args, **kwargs):
        with pytest.raises(UserError, match=error) as caught:
            call(*args, **kwargs)
        assert "\n" not in str(caught.value)

    long = " ".join(["dog"] * 64)
    refused("text 1 has 65 tokens, the model reads at most 64", tiny.hidden_states, ["dog", long])
    refused("5 tokens and 60 of its answer", tiny.generate, ["a small brown dog"], 60)
    other = [{"role": "narrator", "content": "Once"}]
    refused("refuses the roles narrator .only user and assistant", tiny.tokenizer.render, other)
    lost = [*CHAT, {"role": "tool", "content": "42 degrees"}]
    refused("no place for a message of the role 'tool'", tiny.tokenizer.render, lost)
    refused("needs a 'role' and a 'content'", tiny.tokenizer.render, [{"content": "x"}])
    refused("is not empty", tiny.save, folder)
    refused("no such folder; name a folder of transformers", model.load, tmp_path / "none")

    def copy(name, **changes):
        """The folder with values of its config.json changed."""
        new = tmp_path / name
        shutil.copytree(folder, new)
        values = json.loads((new / "config.json").read_text()) | changes
        (new / "config.json").write_text(json.dumps(values))
        return new

    refused("its ids reach 16, the weights know 10", model.load, copy("a", vocab_size=10))
    refused("model_type 'gpt2' is no decoder", model.load, copy("b", model_type="gpt2"))
    refused("mlp_bias = True is not what", model.load, copy("c", mlp_bias=True))
    yarn = {"rope_type": "yarn", "factor": 2.0}
    refused("type 'yarn' cannot be read", model.load, copy("d", rope_scaling=yarn))
    refused(
        "has no 'hidden_size'", load.read_config, copy_without(copy("e"), "hidden_size"), "float32"
    )
    bare = copy("f")
    (bare / "tokenizer.json").unlink()
    refused("has no tokenizer.json", model.load, bare)
    tiny.save(tmp_path / "g", max_file_gb=1e-6)
    shards = sorted((tmp_path / "g").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    refused(f"names files that are not there: {shards[1].name}", model.load, tmp_path / "g")
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF" + bytes(20))
    refused("is not a GGUF file, or is cut short", model.load, gguf)


def copy_without(folder, key):
    values = json.loads((folder / "config.json").read_text())
    del values[key]
    (folder / "config.json").write_text(json.dumps(values))
    return folder
