"""Banks on the Hub: the real client against a small Hub on loopback."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import Trap, make_bank, make_teacher, same, tamper
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from modular_t5 import ModularT5ForConditionalGeneration
from modular_t5.adapters import add_adapters
from modular_t5.loading_modular_t5 import SavedBank


load = ModularT5ForConditionalGeneration.from_pretrained
assemble_from = ModularT5ForConditionalGeneration.assemble_from_pretrained
COMMON = {"config.json", "generation_config.json", "model.safetensors.index.json", "model-common.safetensors"}


@pytest.fixture
def repo(request):
    """A repository name that no other test uses."""
    return "org/" + re.sub(r"\W+", "-", request.node.name[:60]).strip("-")


def test_push_list_and_load(hub, repo, pico_tokenizer, inputs, tmp_path):
    bank = make_bank()
    commit = bank.push_to_hub(repo)
    AutoTokenizer.from_pretrained(pico_tokenizer).push_to_hub(repo)
    listed = set(HfApi().list_repo_files(repo))
    assert listed >= COMMON | {"README.md", "tokenizer.json", "modeling_modular_t5.py", "model-decoder-original.safetensors"}
    assert bank.origin == {"bank": repo, "revision": commit.oid}
    for auto in (AutoModel, AutoModelForSeq2SeqLM, ModularT5ForConditionalGeneration):
        again = auto.from_pretrained(repo, cache_dir=tmp_path)
        assert type(again) is ModularT5ForConditionalGeneration
        assert same(again, bank)
    assert AutoConfig.from_pretrained(repo).granularities == bank.config.granularities
    assert AutoTokenizer.from_pretrained(repo)("one").input_ids
    assert HfApi().get_safetensors_metadata(repo).parameter_count == {"F32": bank.num_parameters()}


def test_a_size_downloads_what_it_uses_and_nothing_else(hub, repo, tmp_path, inputs):
    bank = make_bank(num_layers=12, num_decoder_layers=12)
    bank.push_to_hub(repo)
    sizes = {path: len(content) for path, content in hub.files(repo).items()}
    hub.forget_traffic()
    model = assemble_from(repo, "1x12/4x3", cache_dir=tmp_path)
    wanted = COMMON | {"model-encoder-original.safetensors", "model-decoder-modules-4.safetensors"}
    assert dict(hub.sent) == {path: sizes[path] for path in wanted}
    assert same(model, bank.assemble("1x12/4x3"))
    # A second size downloads the difference, and one that is there nothing.
    hub.forget_traffic()
    assemble_from(repo, "1x12/2x6", cache_dir=tmp_path)
    assert dict(hub.sent) == {"model-decoder-modules-2.safetensors": sizes["model-decoder-modules-2.safetensors"]}
    hub.forget_traffic()
    assert same(assemble_from(repo, "1x12/4x3", cache_dir=tmp_path, local_files_only=True), model)
    assert not hub.asked


def test_revisions(hub, repo, tmp_path):
    first, second = make_bank(), make_bank("v1.1")
    old = first.push_to_hub(repo).oid
    second.push_to_hub(repo, revision="gated")
    second.push_to_hub(repo, commit_message="Another teacher")
    for revision, bank in ((old, first), ("gated", second), ("main", second), (None, second)):
        assert same(load(repo, revision=revision, cache_dir=tmp_path), bank)
        model = assemble_from(repo, "2x3/2x3", revision=revision, cache_dir=tmp_path)
        assert same(model, bank.assemble("2x3/2x3"))
        assert model.config.modular_t5 == {"bank": repo, "revision": hub.sha(repo, revision or "main"), "plan": "2x3/2x3"}
    with pytest.raises(OSError, match="nowhere is not a valid git identifier"):
        load(repo, revision="nowhere")
    with pytest.raises(OSError, match="is not a valid model identifier"):
        assemble_from("org/of-nobody", "2x3/2x3")


def test_a_push_takes_the_place_of_weights_that_were_there(hub, repo, tmp_path):
    make_bank().push_to_hub(repo, max_shard_size="20KB")
    hub.commit(repo, {"model.safetensors": b"of an older format", "frontier.png": b"a picture"})
    bank = make_bank("v1.1")
    bank.push_to_hub(repo)
    left = {path for path in hub.files(repo) if path.startswith("model") and path.endswith(".safetensors")}
    assert left == set(json.loads(hub.files(repo)["model.safetensors.index.json"])["weight_map"].values())
    assert "frontier.png" in hub.files(repo)
    assert same(load(repo, cache_dir=tmp_path), bank)


def test_a_card_that_is_there_stays(hub, repo):
    hub.commit(repo, {"README.md": b"---\ntags:\n- mine\n---\nWritten by hand."})
    make_bank().push_to_hub(repo, tags=["summarization", "mine"])
    card = ModelCard(hub.files(repo)["README.md"].decode())
    assert "Written by hand." in card.text
    assert card.data.tags == ["mine", "summarization"]


def test_names_without_an_owner_and_cards_of_branches(hub, repo, monkeypatch):
    name = repo.split("/")[1]
    hub.commit(f"me/{name}", {"README.md": b"On main."})
    hub.commit(f"me/{name}", {"README.md": b"On a branch."}, "dev")
    bank = make_bank()
    bank.push_to_hub(name)
    bank.push_to_hub(name, revision="dev")
    assert bank.origin == {"bank": f"me/{name}", "revision": hub.sha(f"me/{name}", "dev")}
    for revision, text in (("main", b"On main."), ("dev", b"On a branch.")):
        assert text in hub.files(f"me/{name}", revision)["README.md"]


def test_a_variant_is_pushed_beside_the_rest(hub, repo, tmp_path):
    make_bank().push_to_hub(repo)
    before = {path for path in hub.files(repo) if path.endswith(".safetensors")}
    half = make_bank(dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", variant="bf16", push_to_hub=True, repo_id=repo)
    assert before < {path for path in hub.files(repo) if path.endswith(".safetensors")}
    assert same(load(repo, variant="bf16"), half)


def test_saving_with_push(hub, repo, tmp_path):
    bank = make_bank()
    bank.save_pretrained(tmp_path / "bank", push_to_hub=True, repo_id=repo, private=True)
    assert same(load(repo), bank)


# -- modules alone ---------------------------------------------------------------------------------------------------------


def teacher_on_hub(repo):
    teacher = make_teacher("v1.1")
    teacher.push_to_hub(f"{repo}-teacher")
    return ModularT5ForConditionalGeneration.from_t5(f"{repo}-teacher")


def test_modules_alone_fetch_their_teacher_at_its_commit(hub, repo, tmp_path):
    bank = teacher_on_hub(repo)
    commit = hub.sha(f"{repo}-teacher")
    bank.push_to_hub(repo, modules_only=True)
    make_teacher().push_to_hub(f"{repo}-teacher")  # moves on
    files = hub.files(repo)
    assert {path for path in files if path.endswith(".safetensors")} == {
        f"model-{side}-modules-{s}.safetensors" for side in ("encoder", "decoder") for s in (2, 3, 6)
    }
    assert json.loads(files["config.json"])["teacher"]["revision"] == commit
    hub.forget_traffic()
    assert SavedBank(repo, cache_dir=tmp_path / "0").shape == bank.shape
    assert set(hub.sent) == {"config.json", "model.safetensors.index.json"}  # what sizes there are is known without any weights
    assert same(load(repo, cache_dir=tmp_path / "1"), bank)
    assert f"GET /{repo}-teacher/resolve/{commit}/model.safetensors" in hub.asked
    hub.forget_traffic()
    assert same(assemble_from(repo, "1x6/3x2", cache_dir=tmp_path / "2"), bank.assemble("1x6/3x2"))
    assert {path for path in hub.sent if path.startswith("model-")} == {"model-decoder-modules-3.safetensors"}


def test_another_teacher_is_refused_and_no_code_of_it_runs(hub, repo, tmp_path):
    bank = teacher_on_hub(repo)
    bank.push_to_hub(repo, modules_only=True)
    files = hub.files(f"{repo}-teacher")
    make_teacher("v1.1", initializer_factor=2.0).save_pretrained(tmp_path / "other")
    files["model.safetensors"] = (tmp_path / "other" / "model.safetensors").read_bytes()
    files["evil.py"] = f"open({str(tmp_path / 'sprung')!r}, 'w')".encode()
    evil = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForSeq2SeqLM": "evil.M"}, "model_type": "evil", "num_layers": 3000}
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **evil}).encode()
    files["adapter_config.json"] = b'{"base_model_name_or_path": "org/of-somebody-else"}'
    hub.forget_traffic()
    for way in (load, lambda repo, **arguments: assemble_from(repo, "2x3/2x3", **arguments)):
        with pytest.raises(ValueError, match="were trained for another teacher"):
            way(repo, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="were trained for another teacher"):
        AutoModel.from_pretrained(repo, trust_remote_code=True, cache_dir=tmp_path / "cache")
    del files["model.safetensors"]
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / "trap.bin")
    files["pytorch_model.bin"] = (tmp_path / "trap.bin").read_bytes()
    with pytest.raises(ValueError, match="only safetensors are read"):
        load(repo, cache_dir=tmp_path / "fresh")
    assert not (tmp_path / "sprung").exists()
    of_teacher = {path for path in hub.asked if f"/{repo}-teacher/resolve/" in path and path.startswith("GET")}
    assert {path.rsplit("/", 1)[1] for path in of_teacher} == {"model.safetensors"}
    assert not [asked for asked in hub.asked if "of-somebody-else" in asked]


@pytest.mark.parametrize("named", ["/etc/t5", "../t5", "https://example.org/t5"])
def test_a_hub_bank_whose_teacher_is_a_path(named, hub, repo, tmp_path):
    make_teacher().save_pretrained(tmp_path / "t5")
    bank = ModularT5ForConditionalGeneration.from_t5(tmp_path / "t5")
    bank.save_pretrained(tmp_path / "bank", modules_only=True)
    changed = {path.name: path.read_bytes() for path in (tmp_path / "bank").iterdir()}
    fields = json.loads(changed["config.json"])
    for name in (named, str(tmp_path / "t5")):  # also one that is there
        fields["teacher"]["name_or_path"] = name
        hub.commit(repo, {**changed, "config.json": json.dumps(fields).encode()})
        with pytest.raises(ValueError, match="which is no Hub id"):
            load(repo)


def test_adapters_alone_are_pushed_with_a_teacher_that_others_can_fetch(hub, repo, tmp_path):
    local = ModularT5ForConditionalGeneration.from_t5(make_teacher())
    add_adapters(local, LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"but their teacher is named '', which is no Hub id: set bank\.config\.teacher"):
        local.push_to_hub(repo)
    bank = teacher_on_hub(repo)
    add_adapters(bank, LoraConfig(r=2, init_lora_weights=False))
    bank.push_to_hub(repo)
    whole = load(repo, cache_dir=tmp_path)
    lazily = assemble_from(repo, "2x3/2x3", cache_dir=tmp_path)
    assert same(lazily, whole.assemble("2x3/2x3"))
    for name, tensor in bank.assemble("2x3/2x3").state_dict().items():
        torch.testing.assert_close(lazily.state_dict()[name], tensor)
    weights = sum(len(content) for path, content in hub.files(repo).items() if path.endswith(".safetensors"))
    assert weights < sum(parameter.nbytes for parameter in whole.parameters()) / 2


# -- networks --------------------------------------------------------------------------------------------------------------

SHARD = "model-encoder-modules-2.safetensors"


def test_an_interrupted_download_goes_on(hub, repo, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # kept so far is what came in whole pieces
    bank = make_bank()
    bank.push_to_hub(repo)
    hub.forget_traffic()
    hub.cut_after[SHARD] = [5000, 3000]
    assert same(assemble_from(repo, "2x3/1x6", cache_dir=tmp_path), bank.assemble("2x3/1x6"))
    assert hub.sent[SHARD] == len(hub.files(repo)[SHARD])  # what had arrived was not sent again


def test_a_download_that_fails_says_so_and_the_next_one_succeeds(hub, repo, tmp_path, monkeypatch):
    bank = make_bank()
    bank.push_to_hub(repo)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.cut_after[SHARD] = [100] * 50
    for way in (load, lambda repo, **arguments: assemble_from(repo, "2x3/1x6", **arguments)):
        with pytest.raises(OSError, match=rf"cannot fetch .*{repo}.*try again"):
            way(repo, cache_dir=tmp_path)
    hub.cut_after.clear()
    assert same(load(repo, cache_dir=tmp_path), bank)


def test_a_tampered_shard_on_the_hub(hub, repo, tmp_path):
    make_bank().save_pretrained(tmp_path / "bank")
    tamper(tmp_path / "bank", lambda tensors: tensors.update({"decoder.bank.2.0.layer.0.layer_norm.weight": torch.zeros(1)}))
    hub.commit(repo, {path.name: path.read_bytes() for path in (tmp_path / "bank").iterdir()})
    for way in (load, lambda repo: assemble_from(repo, "2x3/2x3"), AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"decoder\.bank\.2\.0\.layer\.0\.layer_norm\.weight in .* has shape \(1,\)"):
            way(repo)


@pytest.mark.slow
def test_two_processes_fill_one_cache_at_once(hub, repo, tmp_path):
    bank = make_bank()
    bank.push_to_hub(repo)
    code = (
        "import sys; from modular_t5 import ModularT5ForConditionalGeneration as M; "
        f"print(M.from_pretrained({repo!r}, cache_dir=sys.argv[1]).teacher_sha256())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == bank.teacher_sha256()


# -- with and without the package ------------------------------------------------------------------------------------------

WITHOUT_THE_PACKAGE = """
import sys
sys.modules["modular_t5"] = None  # importing it raises ImportError
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, T5ForConditionalGeneration
repo, out = sys.argv[1:]
trust = {"trust_remote_code": True}
bank = AutoModelForSeq2SeqLM.from_pretrained(repo, **trust)
assert type(bank).__module__.startswith("transformers_modules."), type(bank).__module__
assert type(AutoModel.from_pretrained(repo, **trust)).__name__ == type(bank).__name__
assert AutoConfig.from_pretrained(repo, **trust).model_type == "modular_t5"
small = bank.assemble("size-first", 2)
assert type(small) is T5ForConditionalGeneration
lazily = type(bank).assemble_from_pretrained(repo, "size-first", 2)
assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in lazily.state_dict().items())
small.save_pretrained(out + "/small")
bank.set_plan("2x3/2x3")
bank.save_pretrained(out + "/bank")
again = AutoModelForSeq2SeqLM.from_pretrained(out + "/bank", **trust)
assert str(again.plan) == "2x3/2x3"
if "/" in repo and not repo.startswith("/"):
    bank.push_to_hub(repo + "-again")
"""


@pytest.mark.parametrize("modules_only", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_without_the_package(modules_only, hub, repo, inputs, request, tmp_path):
    bank = teacher_on_hub(repo)
    bank.push_to_hub(repo, modules_only=modules_only)
    bank.save_pretrained(tmp_path / "local", modules_only=modules_only)
    for source in [repo, str(tmp_path / "local")] if request.config.getoption("--slow") else [repo]:
        out = tmp_path / source.replace("/", "-")
        out.mkdir()
        command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, source, str(out)]
        done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert same(T5ForConditionalGeneration.from_pretrained(out / "small"), bank.assemble("size-first", 2))
        assert same(load(out / "bank"), bank)
    assert same(load(f"{repo}-again"), bank)


def test_with_the_package_no_remote_code_is_asked_for(hub, repo, tmp_path):
    bank = make_bank()
    bank.push_to_hub(repo)
    hub.commit(repo, {path: f"open({str(tmp_path / 'sprung')!r}, 'w')".encode() for path in hub.files(repo) if path.endswith(".py")})
    hub.forget_traffic()
    for auto in (AutoModel, AutoModelForSeq2SeqLM):
        for trust in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
            assert type(auto.from_pretrained(repo, cache_dir=tmp_path / "cache", **trust)) is ModularT5ForConditionalGeneration
    assemble_from(repo, "2x3/2x3")
    assert not [asked for asked in hub.asked if asked.endswith(".py")]
    assert not (tmp_path / "sprung").exists()
