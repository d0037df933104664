"""A mixture on disk; the small family is that of tests/conftest.py."""

import json

import pytest


@pytest.fixture
def mixture(tmp_path):
    """Writes records, or the given text or bytes, and returns the path."""

    def write(content, name="mixture.json"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, "utf-8")
        else:
            path.write_text(json.dumps(content), "utf-8")
        return path

    return write
