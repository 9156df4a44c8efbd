"""An index is of the checks that its files passed."""

from redmux_server.registry import folder_index


def test_mended_checks_of_files_reach_those_that_are_indexed(tmp_path, monkeypatch):
    (tmp_path / "header.py").write_text("check_little()")
    monkeypatch.setattr(folder_index.format_files, "__file__", str(tmp_path / "files.py"))
    before = folder_index._version.__wrapped__()
    assert folder_index._version.__wrapped__() == before
    (tmp_path / "header.py").write_text("check_more()")
    assert folder_index._version.__wrapped__() != before
