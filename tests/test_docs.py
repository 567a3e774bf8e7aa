"""The documents speak of what is there: links lead somewhere, commands parse, named files and recipes exist."""

import re
import shlex
from pathlib import Path

import pytest

from launch.main import VERBS
from vitscale.recipes import FINETUNE, PRETRAIN, recipe_name

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_commands_of_the_readme_are_verbs_with_their_recipes() -> None:
    recipes = {recipe_name(function) for function in (*PRETRAIN, *FINETUNE)}
    commands = [shlex.split(line, comments=True) for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("vitscale ")]
    assert len(commands) >= 7
    for words in commands:
        verb = " ".join(words[1:3]) if " ".join(words[1:3]) in VERBS else words[1]
        assert verb in VERBS, words
        if verb in ("pretrain", "finetune"):
            assert words[2] in recipes, words


def test_recipes_and_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    recipes = {recipe_name(function) for function in (*PRETRAIN, *FINETUNE)}
    named = set(re.findall(r"`((?:vit|finetune|tiny)-[a-z0-9-]+)`", text))
    assert named
    assert named <= recipes
    layout = text[text.index("## Layout") : text.index("## Figures")]
    files = re.findall(r"\b(\w+\.py)\b", layout)
    there = {path.name for folder in ("launch", "vitscale", "data_tools") for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert set(files) <= there
    assert there - set(files) <= {"config.py", "errors.py", "durable.py"}, "the README's layout leaves these out"
