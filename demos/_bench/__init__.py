"""The parts of ``benchmark.py``, an idea a file."""
