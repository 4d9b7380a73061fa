from __future__ import annotations

from pathlib import Path

import pytest

from orthoreg_ext.experiment.files import check_folder, owned


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".orthoreg-ab12_xyz").mkdir()
    (tmp_path / ".orthoreg-ab12_xyz" / "weights.safetensors").write_text("half")
    (tmp_path / ".state.safetensors.4711.tmp").write_text("half")
    check_folder(tmp_path, resume=False, state_name="state.safetensors")
    with owned(tmp_path):
        pass
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
    with owned(tmp_path):
        pass
    assert mine.exists()


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    written = tmp_path / ".state.safetensors.4711.tmp"
    with owned(tmp_path):
        written.write_text("half")
        with pytest.raises(ValueError, match="is in use: another orthoreg prune"), owned(tmp_path):
            pass
        assert written.exists()  # of the one that is at it
    with owned(tmp_path):
        assert not written.exists()
