import hashlib

from bench import provenance


def test_the_series_hash_follows_the_order_and_the_content(tmp_path):
    (tmp_path / "a.patch").write_text("A")
    (tmp_path / "b.patch").write_text("B")
    (tmp_path / "series").write_text("b.patch  # first\na.patch\n")
    series = (tmp_path / "series").read_bytes()
    assert provenance.series_sha256(tmp_path) == hashlib.sha256(series + b"BA").hexdigest()


def test_the_folder_hash_is_that_of_what_sha256sum_prints(tmp_path):
    (tmp_path / "b").write_text("2")
    (tmp_path / "a").write_text("1")
    (tmp_path / "folder").mkdir()
    lines = "".join(
        f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n"
        for name, text in (("a", "1"), ("b", "2"))
    )
    assert provenance.folder_sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


def test_the_device_is_the_cpus_name(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n")
    assert provenance.cpu_model(cpuinfo) == "A CPU @ 2 GHz"


def test_outside_a_repository_there_is_no_commit(tmp_path):
    assert provenance._git(tmp_path, "rev-parse", "HEAD") is None
