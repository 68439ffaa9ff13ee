"""What the documents say is so."""

from __future__ import annotations

import re
from pathlib import Path

from jobs.cli import COMMANDS
from pipelines.config import Config, dump_config

ROOT = Path(__file__).parent.parent


def test_configuration_page_lists_every_key_with_its_default() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    block = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert block is not None
    assert block[1] == dump_config(Config())


def test_every_relative_link_of_the_documents_leads_somewhere() -> None:
    broken = []
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.name}: {target}")
    assert not broken


def test_readme_is_short_and_names_existing_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) < 150
    named = set(re.findall(r"ctrstream ([a-z]+)", readme))
    assert named <= set(COMMANDS)
