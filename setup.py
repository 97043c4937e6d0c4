"""The metadata that setup.cfg cannot hold: the project's address, and README with links that work on an index."""

import re
import runpy
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
PROJECT_URL = runpy.run_path(str(HERE / "bsa_export" / "version.py"))["PROJECT_URL"]


def long_description() -> str:
    """Returns README.md with absolute links: to the raw file for an image, else to the page that shows it."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    relative = r"(?![a-z]+:|#|/)([^)\s\"]+)"
    text = re.sub(rf"(!\[[^\]]*\]\()(?:\./)?{relative}", rf"\1{PROJECT_URL}/raw/main/\2", text)
    text = re.sub(rf'((?:src|srcset)=")(?:\./)?{relative}', rf"\1{PROJECT_URL}/raw/main/\2", text)
    text = re.sub(rf'(href=")(?:\./)?{relative}', rf"\1{PROJECT_URL}/blob/main/\2", text)
    return re.sub(rf"(\]\()(?:\./)?{relative}", rf"\1{PROJECT_URL}/blob/main/\2", text)


setup(
    url=PROJECT_URL,
    project_urls={
        "Documentation": f"{PROJECT_URL}/tree/main/docs",
        "Source": PROJECT_URL,
        "Issues": f"{PROJECT_URL}/issues",
        "Changelog": f"{PROJECT_URL}/blob/main/CHANGELOG.md",
    },
    long_description=long_description(),
)
