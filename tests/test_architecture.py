"""docs/architecture.md names what is there."""

import ast
import re

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text("utf-8")
PLACES = sorted(set(re.findall(r"`([\w/]+\.py)(?:::([\w.]+))?`", TEXT)))


def names_in(body):
    """What is defined in the body of a module or a class, by name."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_a_place_is_there(file, name):
    path = ROOT / file if file.startswith(("scripts/", "tests/")) else ROOT / "modeling_videomamba" / file
    body = ast.parse(path.read_text("utf-8")).body
    for part in filter(None, name.split(".")):
        found = names_in(body)
        assert part in found, f"{file} has no {name}"
        body = getattr(found[part], "body", [])
