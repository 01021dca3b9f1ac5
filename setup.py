"""README as PyPI shows it: its relative links made absolute by the address in setup.cfg, which says all else."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
config = ConfigParser()
config.read(HERE / "setup.cfg", encoding="utf-8")
url = re.search(r"^Source *= *(\S+)", config["metadata"]["project_urls"], flags=re.MULTILINE)[1]
readme = (HERE / "README.md").read_text(encoding="utf-8")
readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{url}/raw/main/", readme)
readme = re.sub(r"(?<!\!)(\[[^\[\]]*\]\()(?!https?:|#)", rf"\1{url}/blob/main/", readme)

setup(
    script_name="setup.py", long_description=readme, long_description_content_type="text/markdown"
)  # left out of wheels
