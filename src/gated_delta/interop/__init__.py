"""Other libraries' signatures on our operators: argument translation, and nothing else."""
