"""The two questions, asked through transformers' own code of a tiny network of random weights."""

import numpy as np
import pytest

from tests.curation import tiny_smolvlm
from tests.data.image_shards import encode_image, make_record, smooth_image
from webssl_jax.config import UserError
from webssl_jax.curation.scorers import make, smolvlm
from webssl_jax.curation.scorers.smolvlm import QUESTIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_smolvlm.write(tmp_path_factory.mktemp("smolvlm"))


def images():
    rng = np.random.default_rng(0)
    sizes = [(40, 40), (40, 12), (12, 40)]
    return [make_record(encode_image(smooth_image(rng, *size)), i) for i, size in enumerate(sizes)]


def test_answers_do_not_depend_on_the_batch_and_are_what_transformers_own_path_gives(folder):
    import torch

    scorer = make(f"smolvlm:model={folder},dtype=float32")
    together = scorer(images())
    alone = [scorer([image])[0] for image in images()]
    likely = [[row.pop(f"{name}_yes") for name in QUESTIONS] for row in together]
    assert np.ptp(likely, axis=0).min() > 1e-3
    np.testing.assert_allclose(
        likely, [[row.pop(f"{name}_yes") for name in QUESTIONS] for row in alone], rtol=1e-4
    )
    assert together == alone and {*together[0]} < {*smolvlm.SmolVLM.columns}
    assert len({row["text_rich_words"] for row in together}) > 1  # it does look at the images

    loaded = smolvlm._load(str(folder), "float32", "")
    seen = loaded.images(
        [[smolvlm.decode_image(images()[1].image)]], return_row_col_info=True, return_tensors="pt"
    )
    grid = seen.pop("rows")[0][0], seen.pop("cols")[0][0]
    assert grid == (1, 2)
    prompt = smolvlm._prompt(loaded, smolvlm.QUESTIONS["chart_like"], grid)
    assert prompt.startswith(
        "<|im_start|>User:<fake_token_around_image><row_1_col_1><image><image>"
    )
    assert prompt.endswith("Answer only yes or no.<end_of_utterance>\nAssistant:")
    given = loaded.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        ids = loaded.network.generate(**given, **seen, max_new_tokens=8, do_sample=False)
        first = loaded.network(**given, **seen).logits[0, -1].softmax(0)
    yes, no = (
        first[loaded.tokenizer.convert_tokens_to_ids(list(letters))].sum()
        for letters in ("yY", "nN")
    )
    answer = ids[0, given["input_ids"].shape[1] :]
    words = loaded.tokenizer.decode(answer, skip_special_tokens=True)
    assert together[1]["chart_like_words"] == " ".join(words.split())
    assert likely[1][1] == pytest.approx(float(yes / (yes + no)), rel=1e-4)


@pytest.mark.parametrize(
    ("answer", "value"),
    [(" Yes.", 1), ("no", 0), ("No, it has not", 0), ("Yes and no", None), ("", None)]
    + [("Nothing", None), ("eyes", None)],
)
def test_an_answer_is_yes_no_or_unclear(answer, value):
    assert smolvlm.parse(answer) == value


def test_a_folder_that_holds_no_such_model_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"smolvlm:model=.*: cannot be loaded as SmolVLM"):
        make(f"smolvlm:model={tmp_path}")(images())
    with pytest.raises(UserError, match="dtype=int8: must be bfloat16 or"):
        make("smolvlm:dtype=int8")
