"""The pico models that all tests share, their seeds, the Hub that they ask, and the `--slow` switch."""

import gc
import json
import os

import pytest
import torch
from hub import HUB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5.storage_modular_t5 import StoredTensors, write_shards


VOCAB_SIZE = 61
PICO = {"vocab_size": VOCAB_SIZE, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "decoder_start_token_id": 0}

# name -> (model class, configuration): every family of T5 that a bank can be built around
TEACHERS = {
    "v1.0": (T5ForConditionalGeneration, T5Config(**PICO, num_layers=6)),
    "v1.1": (T5ForConditionalGeneration, T5Config(**PICO, num_layers=6, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "v1.1 tied": (T5ForConditionalGeneration, T5Config(**PICO, num_layers=6, feed_forward_proj="gated-gelu")),
    "mt5": (MT5ForConditionalGeneration, MT5Config(**PICO, num_layers=6, tie_word_embeddings=False)),
    "byt5": (
        T5ForConditionalGeneration,
        T5Config(**PICO, num_layers=6, num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "deep decoder": (T5ForConditionalGeneration, T5Config(**PICO, num_layers=2, num_decoder_layers=6)),
}
UNTIED = ("v1.1", "mt5", "byt5")
DTYPES = (torch.float32, torch.bfloat16)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", default=os.environ.get("CI") == "true", help="run the slow tests too (on in CI)")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def pytest_configure():
    torch.set_num_threads(1)  # a second thread costs pico models more than it brings
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # in processes that tests start, too


def pytest_collection_finish():
    gc.freeze()  # a Trainer collects garbage at its end, and looking through all that was imported took a fifth of the tests' time


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make_teacher(name: str = "v1.0", dtype: torch.dtype = torch.float32, **changes):
    """A random teacher of a family; its head is a matrix of its own where the family's is."""
    model_class, config = TEACHERS[name]
    torch.manual_seed(1)
    teacher = model_class(type(config).from_dict({**config.to_dict(), **changes}))
    if name in UNTIED:
        teacher.lm_head.weight = torch.nn.Parameter(torch.randn_like(teacher.lm_head.weight))
        teacher.config.tie_word_embeddings = False
    # Random T5s repeat one token; larger biases and a smaller head make position and depth matter.
    with torch.no_grad():
        for parameter_name, parameter in teacher.named_parameters():
            if "relative_attention_bias" in parameter_name:
                parameter.normal_(std=1.0)
    return teacher.to(dtype).eval()


def make_bank(name="v1.0", dtype=torch.float32, granularities=None, **changes):
    """A bank whose modules differ from the originals and from each other, as after training."""
    bank = ModularT5ForConditionalGeneration.from_t5(make_teacher(name, dtype, **changes), granularities)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in bank.named_parameters():
            if ".bank." in parameter_name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return bank


def stored_tensors(folder):
    """Everything in the shards of a saved bank."""
    return dict(StoredTensors(folder))


def tamper(folder, change, listed=True):
    """Let `change` alter the tensors of a saved bank, and the index with them if they are to be `listed` there."""
    index = folder / "model.safetensors.index.json"
    tensors, before = stored_tensors(folder), index.read_text()
    change(tensors)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write_shards(folder, tensors)
    if not listed:
        index.write_text(before)


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def same(one, other):
    """Whether two models have the same tensors."""
    state = other.state_dict()
    return set(one.state_dict()) == set(state) and all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def hub():
    """The Hub on loopback, its counts at zero."""
    HUB.forget_traffic()
    return HUB


@pytest.fixture(scope="session")
def pico_tokenizer(tmp_path_factory):
    """A folder with a tokenizer for small texts, with T5's special tokens."""
    alphabet = " abcdefghijklmnopqrstuvwxyzäöüßABCDEFGHIJKLMNOPQRSTUVWXYZ,-:"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((character, -3.0) for character in alphabet[1:])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def pico_translation(tmp_path, pico_tokenizer):
    """A folder with a pico teacher and its tokenizer, and a few pairs of texts to train and to test with."""
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    tokenizer.save_pretrained(tmp_path / "teacher")
    make_teacher(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    words = ["ein", "Hund", "und", "ein", "Mann", "am", "Haus"]
    for name, count in (("train", 24), ("test", 6)):
        pairs = [{"en": " ".join(words[i % 5 :]), "de": " ".join(words[: i % 5 + 1])} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"translation": pair}) + "\n" for pair in pairs))
    return tmp_path


@pytest.fixture(params=TEACHERS)
def teacher(request):
    return make_teacher(request.param)


@pytest.fixture
def inputs():
    """A batch with padding on both sides: B 3, source 9, target 5."""
    torch.manual_seed(2)
    input_ids = torch.randint(2, VOCAB_SIZE, (3, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    attention_mask[2, 3:] = 0
    input_ids[attention_mask == 0] = 0
    decoder_input_ids = torch.randint(2, VOCAB_SIZE, (3, 5))
    decoder_input_ids[:, 0] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
