"""The page in a real browser: two prompts are selected, rows sent, and both answer."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import save

import softprompt
from softprompt.backbones import load
from softprompt.prompts import SoftPrompt
from softprompt.serve import Engine
from softprompt.serve.api.app import PAGE, make_app
from softprompt.serve.api.auth import AuthConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_page_loads_nothing_from_elsewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert " src=" not in text
    assert "innerHTML" not in text  # answers are text, never markup


@pytest.fixture
def address(run_folders: list[Path], prompt_of: Callable[..., SoftPrompt]) -> Iterator[str]:
    """A service with a token, two runs with labels, and two prompts that generate text."""
    backbone = load(softprompt.open_run(run_folders[0]).experiment.backbone, dtype="float32")
    engine = Engine(backbone)
    for folder in run_folders:
        engine.add(folder.name, folder)
    for seed in (1, 2):
        engine.add(f"generator-{seed}", prompt_of(backbone, seed))
    config = uvicorn.Config(make_app(engine, AuthConfig(tokens=("sesame",))), port=0, log_config=None)
    sock = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    while not server.started:
        time.sleep(0.02)
    assert httpx.get(url).status_code == 200
    yield url
    server.should_exit = True
    thread.join(15)


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_two_selected_prompts_both_answer(address: str, browser: Any, tmp_path: Path, scheme: str, width: int) -> None:
    from playwright.sync_api import expect

    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.get_by_label("Access token").fill("sesame")
    page.keyboard.press("Tab")
    page.get_by_role("checkbox").nth(3).wait_for()
    assert page.get_by_role("checkbox", checked=True).count() == 1
    page.get_by_role("checkbox", name="tickets-6").check()
    page.get_by_label("Rows").fill("a a a a\nb b\nwhere is my parcel")
    page.keyboard.press("Control+Enter")
    expect(page.locator("[data-done=label]")).to_have_count(6, timeout=30_000)
    for name in ("tickets-3", "tickets-6"):
        answer = page.locator(f"[data-prompt={name}]").first
        assert answer.locator(".label").inner_text() in ("Billing", "Sales", "Returns", "Login", "Delivery", "Other")
        assert answer.locator(".score").count() == 6
        assert answer.locator("time").inner_text().endswith("ms")
    page.screenshot(path=tmp_path / f"labels-{scheme}.png", full_page=True)
    page.get_by_role("button", name="Clear selection").click()
    for name in ("generator-1", "generator-2"):
        page.get_by_role("checkbox", name=name).check()
    page.get_by_label("Max tokens").fill("8")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("[data-done=text]")).to_have_count(6, timeout=30_000)
    page.screenshot(path=tmp_path / f"texts-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not problems
    page.close()


def test_list_follows_a_prompt_that_takes_anothers_place(address: str, browser: Any) -> None:
    """The number of prompts stays the same."""
    page = browser.new_page()
    page.goto(address)
    page.get_by_label("Access token").fill("sesame")
    page.keyboard.press("Tab")
    page.get_by_role("checkbox", name="generator-2").wait_for()
    content = save({"prompt_embeddings": torch.randn(9, 32, generator=torch.Generator().manual_seed(0))})
    with httpx.Client(base_url=address, headers={"Authorization": "Bearer sesame"}) as client:
        client.delete("/v1/prompts/generator-2").raise_for_status()
        client.post("/v1/prompts", params={"name": "newcomer"}, content=content).raise_for_status()
        page.get_by_role("checkbox", name="newcomer").wait_for()
        client.put("/v1/prompts/generator-1", content=content).raise_for_status()
        page.get_by_role("checkbox", name="generator-1 9 vectors").wait_for()
    page.close()
