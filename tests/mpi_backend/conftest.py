"""Nothing here is for pytest to import: tests/test_mpi_backend.py starts it under mpirun."""

collect_ignore_glob = ["*.py"]
