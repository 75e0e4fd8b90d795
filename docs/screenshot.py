"""Makes report.png, the picture in the README: trains, records, writes the report and looks at it in a browser.

    python docs/screenshot.py

Takes half a minute; needs the `dev` extra and a Chromium.
"""

import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from torch import nn

from lightning_gradclip import Clipper, NormClip
from lightning_gradclip.history_writer import HistoryWriter
from lightning_gradclip.report.find import find_runs
from lightning_gradclip.report.page import write_report
from lightning_gradclip.stats import Row

PICTURE = Path(__file__).with_name("report.png")
STEPS = 1500


class Adder(nn.Module):
    """Two recurrent layers that add the two marked numbers of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.RNN(2, 48, batch_first=True)
        self.second = nn.RNN(48, 48, batch_first=True)
        self.head = nn.Linear(48, 1)
        for layer in (self.first, self.second):
            # Wide enough that gradients explode now and then.
            nn.init.orthogonal_(layer.weight_hh_l0, 1.15)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.second(self.first(sequence)[0])
        return self.head(hidden[:, -1])[:, 0]


def batch(count: int = 32, length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    values, marks = torch.rand(count, length), torch.zeros(count, length)
    places = torch.rand(count, length).argsort(1)[:, :2]
    marks.scatter_(1, places, 1.0)
    return torch.stack([values, marks], 2), (values * marks).sum(1)


def train(folder: Path) -> None:
    torch.manual_seed(1)
    model = Adder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    method = NormClip(max_norm=2.0)
    clipper = Clipper(model.named_parameters(), method, optimizer=optimizer)
    parameters = NormClip(per="parameter", max_norm=float("inf"))
    watcher = Clipper(model.named_parameters(), parameters, optimizer=optimizer, action="observe")
    with HistoryWriter(folder, columns=Row._fields, method=method, measure_per="parameter") as history:
        for step in range(STEPS):
            inputs, sums = batch()
            optimizer.zero_grad()
            (model(inputs) - sums).square().mean().backward()
            measured, stats = watcher.step(), clipper.step()
            optimizer.step()
            history.append([step], [stats.row], measured.scopes, np.array([measured.sizes.tolist()]))


def picture(page: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 860, "height": 1000}, color_scheme="light")
        opened.goto(page.as_uri())
        opened.wait_for_selector("html[data-drawn=yes]")
        taken = opened.screenshot(clip={"x": 0, "y": 0, "width": 860, "height": 1000})
        browser.close()
    # A palette takes a third of the space.
    whole = Image.open(io.BytesIO(taken)).convert("RGB")
    whole.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "lightning_logs" / "version_0" / "gradclip")
        write_report(find_runs([folder]), Path(folder) / "report.html")
        picture(Path(folder) / "report.html")
