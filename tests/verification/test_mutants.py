"""Mutants take time, so they are no part of the suite; but each of them can be made, and its tests exist."""

from pathlib import Path

import pytest

from .mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_made(mutant: Mutant, tmp_path: Path) -> None:
    copy = tmp_path / "durable_sa" / mutant.file
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / "durable_sa" / mutant.file).read_text())
    mutant.apply(tmp_path)
    compile(copy.read_text(), copy, "exec")
    for test in mutant.tests:
        file, _, name = test.partition("::")
        name = name.partition("[")[0]
        assert f"def {name}(" in (ROOT / file).read_text() or not name
