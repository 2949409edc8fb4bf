"""Fixtures for every test folder: free ports, the home shared by test runs and its small model, a browser."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from playwright.async_api import Browser, async_playwright

from onebox import sockets
from onebox.settings import Settings
from tests.processes import ROOT, models_home

TEST_MODEL = "smollm2-135m"
FETCH = "from onebox.settings import read_settings; from serving.models import resolve; resolve(read_settings())"


CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--disable-component-update",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that picks a free loopback port."""
    return sockets.free_port


@pytest.fixture(scope="session")
def test_home() -> Path:
    """The `ONEBOX_HOME` that keeps models between test runs."""
    return models_home()


@pytest.fixture(scope="session")
def smollm2_settings(test_home: Path) -> Settings:
    """Settings of a real engine with the tests' small model, which is fetched when it is not there."""
    environment = os.environ | {"ONEBOX_HOME": str(test_home), "ONEBOX_MODEL": TEST_MODEL}
    environment.pop("ONEBOX_TEST_HOME", None)
    subprocess.run([sys.executable, "-c", FETCH], cwd=ROOT, env=environment, check=True)
    return Settings.model_validate({"home": test_home, "engine": "vllm", "model": TEST_MODEL})


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()
