"""What a plan takes: the fit, what is kept in a file, what is refused. How near predictions come is for benchmarks/latency.py."""

import itertools
import json

import pytest
from conftest import make_bank

from modular_t5 import AssemblyPlan
from modular_t5.assembly_modular_t5 import tilings
from modular_t5.latency import fitted, measure_latency


BROKEN = '[{"base_ms": "x", "block_ms": {"encoder": 1, "decoder": 1}, "hardware": "y", "request": {}}]'


@pytest.fixture
def timed(monkeypatch):
    """A machine on which generating takes 3 ms, 2 more for each encoder block and 5 for each decoder block; and what was generated."""
    generated = []

    def measure_seconds(tasks, *, rounds, counts, description):
        for task in tasks:
            task()
            model = task.func.__self__
            generated.append((model, task.keywords))
        return [(3 + 2 * len(model.encoder.block) + 5 * len(model.decoder.block)) / 1000 for model, _ in generated[-len(tasks) :]]

    monkeypatch.setattr("modular_t5.latency.measure_seconds", measure_seconds)
    return generated


@pytest.mark.parametrize("name", ["v1.0", "byt5"])
def test_a_few_plans_predict_all(name, timed):
    bank = make_bank(name)
    latency = measure_latency(bank, batch_size=2, source_length=7, target_length=3, num_beams=2)
    assert len(timed) == 5
    for model, arguments in timed:
        assert arguments["input_ids"].shape == (2, 7)
        assert model.generate(**arguments).shape == (2, 4)
        assert model.encoder.block[0].layer[0].SelfAttention.q.weight.data_ptr() in {p.data_ptr() for p in bank.parameters()}
    shape = bank.shape
    sides = (list(tilings(shape.num_layers[side], shape.granularities[side])) for side in ("encoder", "decoder"))
    for encoder, decoder in itertools.product(*sides):
        assert latency.of(AssemblyPlan(encoder, decoder)) == pytest.approx(3 + 2 * len(encoder) + 5 * len(decoder))
    told = bank.assemble("speed-first", max_latency_ms=latency.of(bank.shape.teacher) - 4, latency=latency).config.modular_t5
    assert told["achieved"]["latency_ms"] <= latency.of(bank.shape.teacher) - 4
    assert told["hardware"] == latency.hardware
    request = {"batch_size": 2, "source_length": 7, "target_length": 3, "num_beams": 2, "dtype": "float32", "device": "cpu"}
    assert told["request"] == request


@pytest.mark.parametrize(("base", "encoder", "decoder"), [(-1, 2, 5), (30, -0.5, 5), (30, 0, 0), (3, 2, 5)])
def test_blocks_never_cost_less_than_nothing_and_the_rest_still_fits(base, encoder, decoder):
    plans = [AssemblyPlan.parse(plan) for plan in ("1x6/1x6", "1x6/6x1", "6x1/1x6", "6x1/6x1", "2x3/2x3")]
    seconds = [(base + encoder * plan.depths[0] + decoder * plan.depths[1]) / 1000 for plan in plans]
    parts = fitted(plans, seconds)
    assert min(parts) >= 0
    errors = [(parts[0] + parts[1] * p.depths[0] + parts[2] * p.depths[1]) / (1000 * s) - 1 for p, s in zip(plans, seconds, strict=True)]
    largest = max(map(abs, errors))
    assert largest < (1e-9 if min(base, encoder, decoder) >= 0 else 0.15)


def test_a_measurement_is_kept_with_what_it_depends_on(timed, tmp_path, monkeypatch):
    file, bank = tmp_path / "latency.json", make_bank()
    first = measure_latency(bank, source_length=5, target_length=2, file=file)
    assert measure_latency(bank, source_length=5, target_length=2, file=file) == first
    assert len(timed) == 5
    measure_latency(bank, source_length=6, target_length=2, file=file)
    assert len(timed) == 10
    bank.set_attn_implementation("eager")
    measure_latency(bank, source_length=6, target_length=2, file=file)
    bank.set_attn_implementation("sdpa")
    assert len(timed) == 15
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    assert measure_latency(bank, source_length=5, target_length=2, file=file).hardware.endswith("77 threads")
    assert len(timed) == 20
    kept = json.loads(file.read_text())
    assert [entry["request"]["source_length"] for entry in kept] == [5, 6, 6, 5]
    assert {"hardware", "date", "versions", "model", "measured_ms"} <= kept[0].keys()


@pytest.mark.parametrize("content", ["{", "[1]", '[{"hardware": "x"}]', '{"base_ms": 1}', "{}", BROKEN])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "latency.json").write_text(content)
    with pytest.raises(ValueError, match="is not what measure_latency keeps"):
        measure_latency(make_bank(), file=tmp_path / "latency.json")


@pytest.mark.parametrize("name", ["batch_size", "source_length", "target_length", "num_beams", "rounds"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_numbers_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {value!r}"):
        measure_latency(make_bank(), **{name: value})


def test_the_clock_is_real():
    latency = measure_latency(make_bank(), source_length=4, target_length=2, rounds=1)
    assert latency.of(AssemblyPlan.parse("1x6/1x6")) > 0
