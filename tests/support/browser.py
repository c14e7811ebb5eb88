"""A report as a reader sees it: in headless Chromium, light and dark."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCHEMES = {"light": 1, "dark": 0}
COLOURFUL = 0.25  # the brightest of a pixel's red, green and blue over the darkest


def seen(page: Path, folder: Path, scheme: str) -> tuple[np.ndarray, str]:
    """Pixels [rows, columns, 3] of 0 to 1, and what the page said on the browser's console.

    Skips the test where no browser is installed.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    picture = folder / f"{scheme}.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--window-size=1200,2000", "--enable-logging=stderr", f"--screenshot={picture}"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000"]
    command += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return imread(picture)[..., :3], said


def assert_readable(page: Path, folder: Path) -> None:
    """It opens without complaint, with ink and coloured lines on a ground of each scheme."""
    for scheme, ground in (("light", 1.0), ("dark", 0.0)):
        pixels, said = seen(page, folder, scheme)
        assert not said, said
        assert np.abs(pixels[0, 0] - ground).max() < 0.2, scheme
        ink = np.abs(pixels - ground).min(-1) > 0.8
        assert ink.mean() > 0.002, f"{scheme}: text that is hardly seen"
        colours = pixels.max(-1) - pixels.min(-1) > COLOURFUL
        assert colours.mean() > 0.0005, f"{scheme}: no drawing is seen"
