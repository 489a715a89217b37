"""Files are written whole or not at all, whoever else writes them."""

import os

from opticam.lab.files import replacing


def test_each_writer_has_a_file_of_its_own(tmp_path):
    """Process numbers repeat, between machines that share a folder and between threads."""
    path = tmp_path / "rows.parquet"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_a_name_may_be(tmp_path):
    path = tmp_path / ("x" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 4) + ".csv")
    with replacing(path) as temporary:
        temporary.write_text("rows")
    assert path.read_text() == "rows"
