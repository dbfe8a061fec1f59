"""Parts of other libraries that are not in their documentation, one file per library.

Nothing else in the package reaches for such a part. Each is guarded by a test in ``tests/test_private_parts.py``, which
says what breaks here when it goes.
"""
