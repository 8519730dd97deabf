"""Pictures of reports for docs/screenshots: desktop, phone and dark, drawn in headless Chromium.

    python benchmarks/screenshots.py edsr=out/demo resnet56=out/goals/resnet56
    python benchmarks/screenshots.py --redraw edsr=out/demo        # the page as this version draws report.json

Chromium is that of the tests (.ci/setup installs it). Pages are cut off where docs need no more of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from edgegen.report.html import write_report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
VIEWS = {"desktop": {"width": 1000}, "phone": {"width": 390, "height": 844}, "dark": {"width": 1000, "dark": True}}
MOST = {"desktop": 9000, "phone": 1700, "dark": 2600}
"""Pixels of height."""


def main() -> None:
    import browser

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screenshots")
    parser.add_argument("--views", default=",".join(VIEWS), help="with commas between")
    parser.add_argument("--redraw", action="store_true", help="draw the page anew from report.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, browser.browser(Path(scratch)) as tab:
        for given in options.bundles:
            name, _, bundle = given.partition("=")
            folder = Path(scratch) / name
            folder.mkdir()
            shutil.copy(Path(bundle) / "report.html", folder)
            if options.redraw:
                if (Path(bundle) / "images").is_dir():
                    shutil.copytree(Path(bundle) / "images", folder / "images")
                write_report(folder, json.loads((Path(bundle) / "report.json").read_text(encoding="utf-8")))
            for view in options.views.split(","):
                seen = tab.open(folder / "report.html", **VIEWS[view])
                if seen.errors or seen.requests:
                    sys.exit(f"{bundle}: {seen.errors} {seen.requests}")
                out = options.out / f"report-{name}-{view}.png"
                tab.shot(out)
                shrink(out, MOST[view])
                print(out)


def shrink(file: Path, height: int) -> None:
    """Cut it off and keep 256 colours: a page has few."""
    with Image.open(file) as image:
        cut = image.convert("RGB").crop((0, 0, image.width, min(image.height, height)))
    cut.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main()
