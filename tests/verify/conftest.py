"""Small converted folders to verify: random models of every family, made once."""

import pytest


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """`converted(family, **options)` gives (source folder, converted folder); each is made once and must not be
    written to."""
    from converted_models import Case, make

    made = {}

    def get(family="bert", **options):
        case = Case(family, **options)
        if case not in made:
            made[case] = make(case, tmp_path_factory.mktemp(family))
        return made[case]

    return get


@pytest.fixture
def damaged(converted, tmp_path):
    """`damaged(family, **options)` gives (source folder, a copy of the converted folder that a test may damage or
    verify, which writes to it)."""
    import shutil

    def copy(family="bert", **options):
        source, folder = converted(family, **options)
        return source, shutil.copytree(folder, tmp_path / "out")

    return copy
