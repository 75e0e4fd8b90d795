"""What holds for all tests."""

import pytest

# They assert in the name of several test files; a failure shows the values there too.
pytest.register_assert_rewrite("application", "command_lines")
