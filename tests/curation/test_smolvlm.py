"""The two questions, asked through transformers' own code of a tiny network of random weights."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.data.image_shards import encode_image, make_record, smooth_image
from webssl_jax.config import UserError
from webssl_jax.curation.scorers import make, smolvlm

TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
MARKS = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As a SmolVLM2 lies on disk: images of up to 2 x 2 tiles of 16 pixels, 4 tokens each."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=MARKS[1],
        eos_token=MARKS[1],
        additional_special_tokens=[*MARKS, "<global-img>", *TILES],
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    torch.manual_seed(0)
    config = transformers.SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config={**small, "image_size": 16, "patch_size": 4, "initializer_range": 1.0},
        text_config={
            **small,
            "model_type": "llama",
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "initializer_range": 1.0,
        },
    )
    path = tmp_path_factory.mktemp("smolvlm")
    transformers.SmolVLMForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    sides = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    SmolVLMImageProcessorPil(**sides).save_pretrained(path)
    return path


def images():
    rng = np.random.default_rng(0)
    sizes = [(40, 40), (40, 12), (12, 40)]
    return [make_record(encode_image(smooth_image(rng, *size)), i) for i, size in enumerate(sizes)]


def test_answers_do_not_depend_on_the_batch_and_are_what_transformers_own_path_gives(folder):
    import torch

    scorer = make(f"smolvlm:model={folder},dtype=float32")
    together = scorer(images())
    alone = [scorer([image])[0] for image in images()]
    assert together == alone and set(together[0]) == set(smolvlm.SmolVLM.columns)
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
    answer = ids[0, given["input_ids"].shape[1] :]
    words = loaded.tokenizer.decode(answer, skip_special_tokens=True)
    assert together[1]["chart_like_words"] == " ".join(words.split())


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
