"""transformers' own tests of a model class, taken from the source release of the installed version and run on a bank.

What a stock T5 passes, a bank must pass, under the teacher plan and under others. The release does not hold transformers' tests of
generation; `test_modeling.py` covers every decoding mode instead.
"""

import os
import subprocess
import sys
import tarfile
from xml.etree import ElementTree

import pytest
import transformers


pytestmark = pytest.mark.slow

SUITE = """
import unittest

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from modular_t5 import ModularT5Config, ModularT5ForConditionalGeneration
from tests.test_modeling_common import ModelTesterMixin, ids_tensor


# The tests know a model with a head by the name of its class.
MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES["modular_t5"] = ModularT5ForConditionalGeneration.__name__


class Tester:
    batch_size, seq_length, encoder_seq_length, decoder_seq_length, key_length = 3, 7, 7, 7, 7
    hidden_size, num_attention_heads, is_training = 32, 4, True
    config_fields = dict(
        vocab_size=99, d_model=32, d_ff=37, d_kv=8, num_heads=4, dropout_rate=0.1, num_layers=6, num_decoder_layers=6,
        relative_attention_num_buckets=8, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, initializer_factor=0.002,
    )

    def __init__(self, config_class, depths, **fields):
        self.config_class, self.fields = config_class, fields
        self.num_hidden_layers, self.num_decoder_layers = depths

    def prepare_config_and_inputs_for_common(self):
        config = self.config_class(**{**self.config_fields, **self.fields})
        ids = ids_tensor([self.batch_size, self.encoder_seq_length], 99).clamp(2)
        decoder_ids = ids_tensor([self.batch_size, self.decoder_seq_length], 99).clamp(2)
        return config, {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": decoder_ids, "decoder_attention_mask": torch.ones_like(decoder_ids),
        }


class Common(ModelTesterMixin):
    is_encoder_decoder = True
    test_resize_embeddings = True
    model_split_percents = [0.5, 0.8, 0.9]


class TeacherPlan_T5(Common, unittest.TestCase):
    all_model_classes = (T5ForConditionalGeneration,)

    def setUp(self):
        self.model_tester = Tester(T5Config, (6, 6))


class TeacherPlan_Bank(Common, unittest.TestCase):
    all_model_classes = (ModularT5ForConditionalGeneration,)

    def setUp(self):
        self.model_tester = Tester(ModularT5Config, (6, 6))


class HalfTheSize_T5(TeacherPlan_T5):
    def setUp(self):
        self.model_tester = Tester(T5Config, (3, 3), num_layers=3, num_decoder_layers=3)


class HalfTheSize_Bank(TeacherPlan_Bank):
    def setUp(self):
        self.model_tester = Tester(ModularT5Config, (3, 3), plan="2x3/2x3")


class UnequalDepth_T5(TeacherPlan_T5):
    def setUp(self):
        self.model_tester = Tester(T5Config, (4, 2), num_layers=4, num_decoder_layers=2)


class UnequalDepth_Bank(TeacherPlan_Bank):
    def setUp(self):
        self.model_tester = Tester(ModularT5Config, (4, 2), plan="1x2-2x2/3x2")
"""

# The common tests import these two, which the source release leaves out.
LEFT_OUT = {"exporters/test_export.py": "class ExportTesterMixin: pass", "generation/test_utils.py": "class GenerationTesterMixin: pass"}


# Left aside, for a bank is not meant to pass them:
LEFT_ASIDE = {
    # These want a gradient in every parameter, and the blocks outside the plan have none; test_modeling.py holds that checkpointing
    # changes no gradient.
    "test_training_gradient_checkpointing",
    # This one opens `model.safetensors`, and a bank is always cut into shards; test_modeling.py saves and loads untied banks.
    "test_load_save_without_tied_weights",
    # This one loads a folder with two sets of weights, none of them the model's; test_loading.py holds that both are refused.
    "test_model_weights_reload_no_missing_tied_weights",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """`{class: {test: outcome}}` of one run of the suite."""
    home = tmp_path_factory.mktemp("suite")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    fetched = subprocess.run(
        [*download, f"transformers=={transformers.__version__}"], cwd=home, capture_output=True, text=True, check=False
    )
    archives = list(home.glob("transformers-*.tar.gz"))
    if not archives:
        pytest.skip(f"the source release of transformers {transformers.__version__} cannot be fetched: {fetched.stderr[-300:]}")
    with tarfile.open(archives[0]) as archive:
        members = [member for member in archive.getmembers() if member.isfile() and "/tests/" in member.name]
        archive.extractall(home, members=members, filter="data")
    root = home / archives[0].name.removesuffix(".tar.gz")
    for name, text in LEFT_OUT.items():
        path = root / "tests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (root / "test_bank.py").write_text(SUITE)
    report = root / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(root),
        "--junitxml",
        str(report),
        "-k",
        f"not ({' or '.join(sorted(LEFT_ASIDE))})",
        "test_bank.py",
    ]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads only get in each other's way on models this small
    done = subprocess.run(command, cwd=root, env=one_thread, capture_output=True, text=True, check=False)
    assert report.exists(), done.stdout + done.stderr
    results: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if problem is None else f"{problem.tag}: {(problem.get('message') or '')[:300]}"
        results.setdefault(case.get("classname").rpartition(".")[2], {})[case.get("name")] = outcome
    return results


@pytest.mark.parametrize("plan", ["TeacherPlan", "HalfTheSize", "UnequalDepth"])
def test_a_bank_passes_what_a_t5_of_its_depth_passes(plan, outcomes):
    stock = {test for test, outcome in outcomes[f"{plan}_T5"].items() if outcome == "passed"}
    assert len(stock) > 80, "the suite itself did not run"
    bank = outcomes[f"{plan}_Bank"]
    failed = {test: bank.get(test) for test in sorted(stock) if bank.get(test) != "passed"}
    assert not failed
