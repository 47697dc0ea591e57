"""One resident bank, requests at different sizes at once: by threads, and through the example's page in a real browser."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import make_bank
from transformers import AutoTokenizer

from modular_t5 import Frontier
from modular_t5.frontier import FrontierPoint


ROOT = Path(__file__).parents[1]


def test_two_threads_at_two_sizes_get_right_answers(inputs):
    bank = make_bank()
    before = {name: parameter.data_ptr() for name, parameter in bank.named_parameters()}
    plans = ["1x6/1x6", "2x3/3x2", "6x1/6x1"]
    alone = {plan: bank.assemble(plan).generate(inputs["input_ids"], max_new_tokens=8) for plan in plans}
    views = {plan: bank.assemble(plan, share_weights=True) for plan in plans}

    def answer(i):
        plan = plans[i % 3]
        return plan, views[plan].generate(inputs["input_ids"], max_new_tokens=8)

    with ThreadPoolExecutor(6) as threads:  # two on each view
        for plan, ids in threads.map(answer, range(60)):
            assert torch.equal(ids, alone[plan])
    pointers = set(before.values())
    assert all(parameter.data_ptr() in pointers for view in views.values() for parameter in view.parameters())


@pytest.fixture
def page(tmp_path, pico_tokenizer):
    """The example's address, serving a pico bank."""
    pytest.importorskip("gradio", reason="pip install gradio")
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    bank = make_bank(vocab_size=len(tokenizer))
    bank.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    measured = [("teacher", "1x6/1x6", 100.0, 100.0), ("size-first 2x", "2x3/2x3", 90.0, 190.0), ("size-first 6x", "6x1/6x1", 50.0, 400.0)]
    points = [FrontierPoint.of(name, bank.report(plan), {"BLEU": score}, {}, speed) for name, plan, score, speed in measured]
    Frontier(tuple(points), "BLEU").save(tmp_path / "frontier.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples" / "serve_budgets.py", "--bank", tmp_path, "--port", port, "--max_new_tokens", 5]
    command += ["--example", "ein Hund"]
    settings = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1,localhost"}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([str(word) for word in command], env={**os.environ, **settings}, stdout=log, stderr=log)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/", bank, tokenizer
    finally:
        process.terminate()
        process.wait()
        log.close()


@pytest.mark.slow
def test_the_page_answers_in_a_browser(page, tmp_path):
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no chromium: install one to run this")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    address, bank, tokenizer = page

    def answer_of(plan):
        ids = tokenizer("ein Hund", return_tensors="pt").input_ids
        return tokenizer.decode(bank.assemble(plan).generate(ids, max_new_tokens=5)[0], skip_special_tokens=True)

    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1000, "height": 1100})
        tab.goto(address)
        tab.click("#ask")
        tab.wait_for_selector("#frontier img")
        assert tab.input_value("#teacher textarea") == answer_of("1x6/1x6")
        assert tab.input_value("#small textarea") == answer_of("6x1/6x1")
        assert "6x1/6x1: 1+1 layers" in tab.inner_text("#small-told")
        tab.fill("#budget input[type=number]", "1.5")
        tab.press("#budget input[type=number]", "Enter")
        tab.click("#ask")
        tab.wait_for_function("document.querySelector('#small-told').innerText.includes('2x3/2x3')")
        assert tab.input_value("#small textarea") == answer_of("2x3/2x3")
        tab.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.slow
def test_without_measured_sizes_it_says_what_to_do(tmp_path):
    pytest.importorskip("gradio", reason="pip install gradio")
    command = [sys.executable, str(ROOT / "examples" / "serve_budgets.py"), "--bank", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "measure the sizes on offer first: modular-t5 frontier" in done.stderr
