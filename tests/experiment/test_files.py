from __future__ import annotations

from pathlib import Path

import pytest

from orthoreg_ext.experiment.files import check_folder, create_folder


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".orthoreg-ab12_xyz").mkdir()
    (tmp_path / ".orthoreg-ab12_xyz" / "weights.safetensors").write_text("half")
    (tmp_path / ".state.safetensors.4711.tmp").write_text("half")
    check_folder(tmp_path, resume=False, state_name="state.safetensors")
    create_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".mine.tmp", ".orthoreg-notes", ".orthoreg-ab12_xyz"])
def test_what_only_looks_like_it_is_somebody_elses(name: str, tmp_path: Path) -> None:
    mine = tmp_path / name
    if name == ".orthoreg-ab12_xyz":  # the name of one, with something else in it
        mine.mkdir()
        (mine / "thesis.tex").write_text("mine")
    else:
        mine.write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        check_folder(tmp_path, resume=True, state_name="state.safetensors")
    create_folder(tmp_path)
    assert mine.exists()
