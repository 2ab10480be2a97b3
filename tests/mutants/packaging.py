"""Wrong changes of what is built and packed."""

from mutants.change import Change

CHANGES = (
    Change(
        "the weights that eval needs are in no wheel",
        "pyproject.toml",
        ', "data/arithmetic/*"',
        "",
        "tests/test_build.py::test_native_wheel_of_the_sources_archive",
    ),
    Change(
        "the archive of sources has no kernels",
        "MANIFEST.in",
        "graft csrc\n",
        "",
        "tests/test_build.py::test_native_wheel_of_the_sources_archive",
    ),
    Change(
        "a wheel for several Pythons is tagged for one",
        "setup.py",
        'return "py3", "none", ',
        'return "cp311", "cp311", ',
        "tests/test_build.py::test_a_wheel_for_several_pythons_is_for_any",
    ),
    Change(
        "an interpreter that is not there is left out",
        "setup.py",
        """            raise SystemExit(f"pcp-mla: PCP_MLA_PYTHONS must name interpreters, got {python!r} ({error})") from None
""",
        "            continue\n",
        "tests/test_build.py::test_unknown_python",
    ),
)
